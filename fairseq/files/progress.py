"""Progress files: what an unfinished run notes beside its temporary files, so that the same command can go on."""

from __future__ import annotations

import os
from typing import Any

from fairseq.errors import BadFile
from fairseq.files.atomic_io import read_json


def read_progress(path: str) -> dict[str, Any]:
    """What an unfinished run noted in `path`; empty where there is no such file, or one that says nothing: the job then
    starts from the beginning."""
    if not os.path.exists(path):
        return {}
    try:
        progress = read_json(path)
    except BadFile:
        return {}
    return progress if isinstance(progress, dict) else {}


def rows_noted(progress: dict[str, Any], name: str) -> int:
    """The number of rows that `progress` gives under `name`; 0 where that is no number of rows."""
    rows = progress.get(name)
    return rows if type(rows) is int and rows > 0 else 0
