"""Folders that a command creates, and removes again when it fails before anything was written to them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fairseq.errors import UserError

_created: list[Path] = []


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Creates a folder, and those above it."""
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot create this folder ({error.strerror}); choose a writable place") from error
    _created.extend(reversed(missing))


def make_parent(path: str | os.PathLike[str]) -> None:
    """Creates the folder that `path` goes into."""
    make_folder(Path(path).parent)


def forget_folders() -> None:
    """Keeps the folders created so far: `remove_empty_folders` will not remove them."""
    _created.clear()


def remove_empty_folders() -> None:
    """Removes empty folders that `make_folder` created; called when a command fails."""
    while _created:
        with contextlib.suppress(OSError):
            _created.pop().rmdir()
