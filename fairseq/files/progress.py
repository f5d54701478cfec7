"""Progress files: the state that an unfinished run records beside its temporary files, so that the same command can
continue."""

from __future__ import annotations

import os
from typing import Any

from fairseq.errors import BadFile
from fairseq.files.atomic_io import read_json


def read_progress(path: str) -> dict[str, Any]:
    """The state that an unfinished run recorded in `path`; empty where the file does not exist or cannot be read, so
    that the job starts from the beginning."""
    if not os.path.exists(path):
        return {}
    try:
        progress = read_json(path)
    except BadFile:
        return {}
    return progress if isinstance(progress, dict) else {}


def rows_noted(progress: dict[str, Any], name: str) -> int:
    """The number of rows in the field `name` of `progress`; 0 where it is not a valid number of rows."""
    rows = progress.get(name)
    return rows if type(rows) is int and rows > 0 else 0
