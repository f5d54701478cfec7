"""The scripts that reproduce the paper's tables: their plan, their options, the resumable download, the tables."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fairseq.evaluation.sweep_curves import Curve
from fairseq.evaluation.sweep_figures import PAPER, PAPER_FILE

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "retomaton"
SCRIPTS = ("reproduce_wikitext103.sh", "reproduce_law.sh")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_tables", FOLDER / "tables.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["paper_tables"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plan_comes_first_and_touches_nothing(script: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    flags = ["--scale", "small", "--text", text, "--lm-text", text]
    for more in (flags, ["--download"]):
        done = run(FOLDER / script, *more, "--plan", "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "GB free" in done.stdout and "memory" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--scale", "tiny"], "--scale: found tiny"),
        (["--text", "nowhere"], "--text: found nowhere"),
        (["--updates", "0"], "--updates: found 0"),
        (["--nonsense"], "found --nonsense"),
        (["--scale", "small"], "needs --text"),
    ],
)
def test_mistakes_are_one_sentence(script: str, flags: list[str], sentence: str) -> None:
    done = run(FOLDER / script, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def in_library(tmp_path: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Runs shell commands with the library's functions and $RUN."""
    return run("-c", f"set -euo pipefail; source {FOLDER}/lib.sh; RUN={tmp_path}/run; mkdir -p $RUN/done; {commands}")


def test_a_stage_runs_once(tmp_path: Path) -> None:
    once = f"stage one bash -c 'echo ran >>{tmp_path}/log'"
    assert in_library(tmp_path, f"{once}; {once}").returncode == 0
    assert in_library(tmp_path, once).returncode == 0
    assert (tmp_path / "log").read_text() == "ran\n"
    assert in_library(tmp_path, "stage two false; echo not reached").stdout.endswith("$ false\n")
    assert not (tmp_path / "run" / "done" / "two").exists()


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    assert in_library(tmp_path, "begin 'small 8'").returncode == 0
    assert "other settings" in in_library(tmp_path, "begin 'small 9'").stderr


def test_downloads_go_on_and_are_checked(tmp_path: Path) -> None:
    source = tmp_path / "artefact"
    source.write_bytes(bytes(range(256)) * 40)
    target = tmp_path / "got" / "artefact"
    target.parent.mkdir()
    (target.parent / "artefact.part").write_bytes(source.read_bytes()[:1000])
    fetch = f"fetch file://{source} {target}"
    assert in_library(tmp_path, f"{fetch} 10240").returncode == 0
    assert target.read_bytes() == source.read_bytes() and not (target.parent / "artefact.part").exists()
    assert in_library(tmp_path, f"{fetch} 10240").stdout == ""  # nothing left to do
    assert "found 10240 bytes, expected 99" in in_library(tmp_path, f"{fetch} 99").stderr


def test_texts_are_found_by_name(tmp_path: Path) -> None:
    for name in ("a.train.txt", "b.dev.txt"):
        (tmp_path / name).touch()
    done = in_library(tmp_path, f"text_of {tmp_path} train; text_of {tmp_path} valid dev")
    assert done.stdout.split() == [f"{tmp_path}/a.train.txt", f"{tmp_path}/b.dev.txt"]
    assert "found 0 files named *test*" in in_library(tmp_path, f"text_of {tmp_path} test").stderr


def test_every_test_text_is_evaluated(tmp_path: Path) -> None:
    """Each gets the name that preprocess.py gives it, and tables and figures of its own."""
    for name in ("b.test.txt", "a.test.txt"):
        (tmp_path / name).touch()
    show = 'joined "${TESTS[@]}"; joined "${SPLITS[@]}"'
    done = in_library(tmp_path, f"tests_of {tmp_path}; {show}")
    assert done.stdout.split() == [f"{tmp_path}/a.test.txt,{tmp_path}/b.test.txt", "test,test1"]
    stub = "stage() { echo $1; }; show() { :; }; python() { [[ $2 == *tune.json ]] && echo 0.5 2 || true; }"
    settings = "LM=() SEARCH=() GPU=() K=8 MEMBERS=(m) LMBDA='' KNN_TEMP=''"
    done = in_library(tmp_path, f"tests_of {tmp_path}; {settings}; {stub}; methods n data model store index title")
    stages = "scores-n-valid scores-n-test scores-n-test1 tune-n adaptret-n sweep-n-test sweep-n-test1"
    assert [line for line in done.stdout.splitlines() if " " not in line] == stages.split(), done.stderr
    assert "found 0 files named *test*" in in_library(tmp_path, f"tests_of {tmp_path}/run").stderr


def test_only_whole_lines_are_taken(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x" * 99 + "\n" + ("y" * 999_989 + "\n"))
    assert in_library(tmp_path, f"first_lines {tmp_path}/t 1000 {tmp_path}/one").returncode == 0
    assert (tmp_path / "one").read_text() == "x" * 99 + "\n"
    assert in_library(tmp_path, f"first_lines {tmp_path}/t 2000 {tmp_path}/two").returncode == 0
    assert (tmp_path / "two").read_text() == (tmp_path / "t").read_text()


def test_reading_off_a_curve(tables: ModuleType) -> None:
    curve = Curve("", [0.2, 40.0, 80.0], [16.0, 16.4, 17.2])
    assert tables.at(curve, 0) == 16.0
    assert tables.at(curve, 60) == pytest.approx(16.8)
    assert tables.at(curve, 81) is None
    assert tables.free_share(curve, 16.8) == pytest.approx(60)
    assert tables.free_share(curve, 99) == 80
    assert tables.free_share(curve, 15) is None


def test_table(tables: ModuleType) -> None:
    def point(series: str, saved: float, perplexity: float) -> dict[str, object]:
        name, _, probability = series.partition(" --skip-probability ")
        settings = {"strategy": name, "series": series, "members": None, "k": 8, "lmbda": 0.25, "knn_temp": 1}
        settings |= {"min_knns": int(100 - saved) if name == "retomaton" else None}
        settings |= {"skip_probability": float(probability)} if probability else {}
        return {**settings, "searches_saved_percent": saved, "perplexity": perplexity}

    points = [point("knnlm", 0, 17), point("random_skip --skip-probability 0.5", 50, 18)]
    points += [point("retomaton", 0, 16), point("retomaton", 60, 17)]
    published = json.loads(PAPER_FILE.read_text())["wikitext103"]
    text = tables.markdown({"points": points, "lm": {"perplexity": 19, "count": 5}}, "A title", published)
    lines = text.splitlines()
    assert lines[0] == "### A title" and "LM alone: perplexity 19.00" in text
    assert "| kNN-LM | 17.00 | 17.20 | 17.60 | 18.00 |  |  |  |  | 50 % |  |" in lines
    assert "| RetoMaton without clusters | 16.00 | 16.17 | 16.50 | 16.83 | 17.00 |  |  |  | 60 % | 60 % |" in lines
    (line,) = (line for line in lines if line.startswith("| *RetoMaton, published*"))
    assert line.startswith("| *RetoMaton, published* | 16.08 |") and line.endswith("81 % | 81 % |")


def test_the_papers_points() -> None:
    """Shares are fractions, curves rise with them, and every choice of --paper is there."""
    published = json.loads(PAPER_FILE.read_text())
    for name in PAPER:
        for pairs in published[name]["methods"].values():
            assert all(0 <= share <= 1 for share, _ in pairs)
            assert pairs == sorted(pairs) and [y for _, y in pairs] == sorted(y for _, y in pairs)
