"""The demo's table, finding and figure, from results files whose figures are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fairseq.errors import MissingFile

SCRIPT = Path(__file__).parents[2] / "examples" / "retomaton" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_report", SCRIPT)
    module = sys.modules["demo_report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = {
    "lm": (140.0, None),
    "knnlm": (112.0, 0.0),
    "skip-0.5": (125.0, 50.0),
    "retomaton-1": (113.5, 52.0),
    "retomaton-16": (110.2, 45.0),
    "clusters-1": (112.1, 78.0),
    "clusters-64": (107.9, 60.0),
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, (perplexity, saved) in RESULTS.items():
        result = {
            "perplexity": perplexity,
            "lookups_saved_percent_printed": saved and 0.9 * saved,
            "searches_saved_percent": saved,
            "tokens_per_second": 1234.5,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "lm-other.txt").write_text("not a result")
    return tmp_path


def test_the_table_has_a_row_for_each_result_with_both_shares(report: ModuleType, results: Path) -> None:
    rows, raw = report.read_rows(results)
    assert set(raw) == set(RESULTS)
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(RESULTS) and len(set(map(len, lines))) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["LM", "", "140.00", "-", "-", "1,234"]
    assert cells[4] == ["kNN-LM, random skipping", "--skip-probability 0.5", "125.00", "45.0 %", "50.0 %", "1,234"]
    assert [row[1] for row in cells[5:]] == [f"--min-knns {tau}" for tau in (16, 1, 64, 1)]


def test_the_finding_is_the_largest_saving_that_beats_knnlm(report: ModuleType, results: Path) -> None:
    rows, _ = report.read_rows(results)
    assert report.compare(rows) == "RetoMaton skips 60 % of kNN-LM's searches at a lower perplexity"
    worse = [row for row in rows if row.prefix in ("lm", "knnlm") or row.perplexity > 112]
    assert "at a price" in report.compare(worse)


def test_curves_are_ordered_by_what_they_save(report: ModuleType, results: Path) -> None:
    rows, _ = report.read_rows(results)
    assert report.points(rows, "retomaton") == ([45.0, 52.0], [110.2, 113.5])
    assert report.points(rows, "knnlm", "skip") == ([0.0, 50.0], [112.0, 125.0])


def test_all_files_are_written(
    report: ModuleType, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["report.py", str(results), "--output", str(tmp_path / "out")])
    report.main()
    assert (tmp_path / "out" / "ppl_vs_foss.png").read_bytes()[1:4] == b"PNG"
    svg = (tmp_path / "out" / "ppl_vs_foss.svg").read_text()
    assert all(family.label in svg for family in report.FAMILIES[2:])
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(saved["rows"]) == len(saved["runs"]) == len(RESULTS)
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out


def test_no_results_is_one_sentence(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="results-json"):
        report.read_rows(tmp_path)
