"""Progress files: the state that an unfinished run records beside its temporary files, so that the same command can
continue. A damaged one, or one of another run, is never continued from; a warning says that the job starts from the
beginning."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from fairseq.errors import BadFile
from fairseq.files.atomic_io import read_json, write_json
from fairseq.files.sidecar import digest_of_fields

logger = logging.getLogger(__name__)

SEAL = "seal"


def write_progress(path: str, state: dict[str, Any]) -> None:
    """Records the state of an unfinished run, with a digest of it."""
    content = json.loads(json.dumps(state))
    write_json(path, {**content, SEAL: digest_of_fields(content)})


def read_progress(path: str) -> dict[str, Any]:
    """The state that an unfinished run recorded in `path`; empty where the file does not exist, or, with a warning, is
    damaged, so that the job starts from the beginning."""
    if not os.path.exists(path):
        return {}
    try:
        progress = read_json(path)
    except BadFile:
        progress = None
    seal = progress.pop(SEAL, None) if isinstance(progress, dict) else None
    if not isinstance(progress, dict) or (seal is not None and seal != digest_of_fields(progress)):
        said = "%s is damaged: what the unfinished run did is not known, so the job starts from the beginning"
        logger.warning(said, path)
        return {}
    return progress


def rows_noted(progress: dict[str, Any], name: str) -> int:
    """The number of rows in the field `name` of `progress`; 0 where it is not a valid number of rows."""
    rows = progress.get(name)
    return rows if type(rows) is int and rows > 0 else 0


def warn_of_other_run(path: str, progress: dict[str, Any]) -> None:
    """Warns that a progress file which could be read is not continued from."""
    if progress:
        logger.warning("%s is of a run with other inputs or flags, so the job starts from the beginning", path)
