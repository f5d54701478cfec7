"""A table of what may be wrong with a file, for each reader. A reader has a cell for every kind; a kind without a cell
fails the tests that go through the table (`test_formats_kinds_of_wrong.py`): none is forgotten when a reader
or a kind is added."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = (
    "too short",
    "too long",
    "other type",
    "other endianness",
    "header",
    "other owner",
    "other vocabulary",
    "non-finite",
    "empty",
)
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Refused:
    """After `change` in a folder, reading ends in a sentence that matches `says`."""

    change: Change
    says: str


@dataclass(frozen=True)
class Same:
    """After `change`, the file reads as before: it says the same in another form."""

    change: Change


@dataclass(frozen=True)
class NoSuchThing:
    """The kind does not apply, or cannot be detected from the files; `why` says which."""

    why: str


Cell = Refused | Same | NoSuchThing


@dataclass(frozen=True)
class Reader:
    """write(folder) makes the files; read(folder) gives something that can be compared, or raises UserError."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    cells: dict[str, Cell]


def in_file(name: str, change: Callable[[bytes], bytes]) -> Change:
    """A change of a file's bytes."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file with header."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
