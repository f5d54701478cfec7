"""Results files as they are read again: whatever is missing or of another type is one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fairseq.errors import BadFile
from fairseq.evaluation.results_files import (
    OF_EVALUATION,
    OF_POINT,
    digest_of_points,
    read_evaluation,
    read_sweep,
)

POINT = {
    "strategy": "knnlm", "series": "knnlm", "members": None, "k": 8, "lmbda": 0.25, "knn_temp": 1.0,
    "perplexity": 20.5, "searches_saved_percent": 0.0,
}
SWEEP = {
    "points": [POINT, {**POINT, "members": "m.pkl"}], "lm": {"perplexity": 21.0, "count": 5}, "labels": {"a": "b"},
    "saving_flags": {"knnlm": ["min_knns"]},
}
EVALUATION = {"perplexity": 20.5, "tokens_per_second": 100.0, "searches_saved_percent": 10.0}
WRONG = ([], {}, "x", None, True)
GONE = object()


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def written(folder: Path, content: Any) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps(content))
    return path


def test_right_files_are_read(tmp_path: Path) -> None:
    assert read_sweep(written(tmp_path, SWEEP)) == SWEEP
    assert read_evaluation(written(tmp_path, EVALUATION)) == EVALUATION


def test_changed_points(tmp_path: Path) -> None:
    written_by_a_sweep = {**SWEEP, "points_digest": digest_of_points(SWEEP["points"], []), "earlier_points": []}
    assert read_sweep(written(tmp_path, written_by_a_sweep))["points"] == SWEEP["points"]
    edited = changed(written_by_a_sweep, ("points", 0, "perplexity"), 12.5)
    with pytest.raises(BadFile, match="points that differ from those that were written"):
        read_sweep(written(tmp_path, edited))


SWEEP_PLACES = [("points",), ("lm",), ("lm", "count"), ("points", 0), *(("points", 1, name) for name in OF_POINT)]


@pytest.mark.parametrize("place", SWEEP_PLACES, ids=str)
def test_a_sweep_with_a_wrong_field(tmp_path: Path, place: tuple[Any, ...]) -> None:
    values = [GONE] if isinstance(place[-1], str) else []
    for value in [*values, *WRONG]:
        name = place[-1]
        if (name in ("strategy", "series") and value == "x") or (name == "members" and value in ("x", None)):
            continue
        with pytest.raises(BadFile, match=r"r\.json: found .*, expected the results that fairseq-sweep wrote; "):
            read_sweep(written(tmp_path, changed(SWEEP, place, value)))


@pytest.mark.parametrize("value", [0, [], "x", {"a": 1}])
@pytest.mark.parametrize("name", ["labels", "saving_flags"])
def test_optional_fields_have_types_too(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(BadFile, match="expected the results that fairseq-sweep wrote"):
        read_sweep(written(tmp_path, {**SWEEP, name: value}))


@pytest.mark.parametrize("name", [*OF_EVALUATION, "searches_saved_percent", "lookups_saved_percent_printed"])
def test_an_evaluation_with_a_wrong_field(tmp_path: Path, name: str) -> None:
    for value in WRONG:
        if value is None and name not in OF_EVALUATION:  # of an evaluation without retrieval
            continue
        with pytest.raises(BadFile, match="expected the results that eval_lm.py --results-json wrote"):
            read_evaluation(written(tmp_path, {**EVALUATION, name: value}))


@pytest.mark.parametrize("content", [[], 3, "x", None, SWEEP["lm"], {"points": [], "lm": SWEEP["lm"]}])
def test_other_files(tmp_path: Path, content: Any) -> None:
    for read in (read_sweep, read_evaluation):
        with pytest.raises(BadFile, match="expected the results"):
            read(written(tmp_path, content))
