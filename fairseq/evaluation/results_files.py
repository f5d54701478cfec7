"""Results files that other programs read again: what `eval_lm.py --results-json` and `fairseq-sweep` wrote. Whatever a
table or a figure takes from them is checked here, so that another file, or an edited one, is one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from fairseq.errors import BadFile
from fairseq.files.atomic_io import read_json

Path = str | os.PathLike[str]
Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)
TEXT: Kinds = (str,)
OPTIONAL_TEXT: Kinds = (str, type(None))
LARGEST = 1 << 30  # bytes
OF_EVALUATION: dict[str, Kinds] = {"perplexity": NUMBER, "tokens_per_second": NUMBER}
MAYBE_OF_EVALUATION: dict[str, Kinds] = {  # null without retrieval
    "lookups_saved_percent_printed": (*NUMBER, type(None)),
    "searches_saved_percent": (*NUMBER, type(None)),
}
OF_SWEEP: dict[str, Kinds] = {"points": (list,), "lm": (dict,)}
MAYBE_OF_SWEEP: dict[str, Kinds] = {"labels": (dict,), "saving_flags": (dict,)}
OF_LM: dict[str, Kinds] = {"perplexity": NUMBER, "count": NUMBER}
OF_POINT: dict[str, Kinds] = {
    "strategy": TEXT,
    "series": TEXT,
    "members": OPTIONAL_TEXT,
    "k": NUMBER,
    "lmbda": NUMBER,
    "knn_temp": NUMBER,
    "perplexity": NUMBER,
    "searches_saved_percent": NUMBER,
}


def read_evaluation(path: Path) -> dict[str, Any]:
    """The results of an evaluation; BadFile for anything else."""
    expected = "the results that eval_lm.py --results-json wrote"
    content = _object(path, read_json(path), "", expected)
    _check(path, content, "", OF_EVALUATION, expected)
    _check(path, content, "", MAYBE_OF_EVALUATION, expected, optional=True)
    return content


def read_sweep(path: Path) -> dict[str, Any]:
    """The results of a sweep, with at least one point; BadFile for anything else."""
    expected = "the results that fairseq-sweep wrote"
    content = _object(path, read_json(path, LARGEST), "", expected)
    _check(path, content, "", OF_SWEEP, expected)
    _check(path, content, "", MAYBE_OF_SWEEP, expected, optional=True)
    _check(path, content["lm"], " of the model alone", OF_LM, expected)
    if not content["points"]:
        raise BadFile(path, "no point", expected, "run the sweep again")
    written = content.get("points_digest")
    if written is not None and written != digest_of_points(content["points"], content.get("earlier_points", [])):
        raise BadFile(path, "points that differ from those that were written", expected, "run the sweep again")
    for number, point in enumerate(content["points"]):
        _check(path, _object(path, point, f" in point {number}", expected), f" of point {number}", OF_POINT, expected)
    for name, text in content.get("labels", {}).items():
        _check(path, {name: text}, " among the labels", {name: TEXT}, expected)
    for name, flags in content.get("saving_flags", {}).items():
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise BadFile(path, f"saving_flags of {name} that are no names", expected, "run the sweep again")
    return content


def digest_of_points(points: Any, earlier: Any) -> str:
    """A digest by which whoever reads a sweep's results detects that points have been changed. earlier: points of
    earlier runs that the file keeps."""
    text = json.dumps([points, earlier], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _object(path: Path, content: Any, where: str, expected: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BadFile(path, f"a {type(content).__name__}{where}", expected, "give another file, or make it again")
    return content


def _check(
    path: Path,
    content: Mapping[str, Any],
    where: str,
    fields: Mapping[str, Kinds],
    expected: str,
    optional: bool = False,
) -> None:
    """BadFile unless the fields are there, unless they are optional, and of their types."""
    for name, kinds in fields.items():
        if name not in content:
            if optional:
                continue
            raise BadFile(path, f"no {name}{where}", expected, "give another file, or make it again")
        value = content[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            found = f"{value!r:.40} as {name}{where}"
            raise BadFile(path, found, expected, "give another file, or make it again")
