"""Range checks of numbers from files that are used as indices. Compiled loops and FAISS do not check indices, so each
such array is checked once, where it is read from its file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile

CHUNK = 1 << 22  # numbers checked at a time: 32 MB at most


def require_range(path: str, numbers: NDArray[Any], least: int, below: int, what: str, remedy: str) -> None:
    """BadFile unless all `numbers` (integers of any shape, row-major) are from `least` to `below` - 1."""
    flat = numbers.reshape(-1)
    low, high = least, least
    for start in range(0, len(flat), CHUNK):
        some = flat[start : start + CHUNK]
        low, high = min(low, int(some.min())), max(high, int(some.max()))
    if len(flat) and (low < least or high >= below):
        raise BadFile(path, f"{what} from {low} to {high}", f"{what} from {least} to {below - 1}", remedy)


def require_numbers(path: str, numbers: NDArray[np.floating], most: float, what: str, remedy: str) -> None:
    """BadFile unless all `numbers` (row-major) are at most `most`, and none of them is NaN or minus infinity."""
    flat = numbers.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        some = flat[start : start + CHUNK]
        if not (np.isfinite(some) & (some <= most)).all():
            bad = start + int((~(np.isfinite(some) & (some <= most))).argmax())
            expected = "finite numbers" if most == np.inf else f"finite numbers of at most {most:g}"
            raise BadFile(path, f"{flat[bad]} as {what} {bad}", expected, remedy)


def require_no_nan(path: str, numbers: NDArray[np.floating], what: str, remedy: str) -> None:
    """BadFile for NaN among `numbers` (row-major), which may be infinite."""
    flat = numbers.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        if np.isnan(flat[start : start + CHUNK]).any():
            bad = start + int(np.isnan(flat[start : start + CHUNK]).argmax())
            raise BadFile(path, f"nan as {what} {bad}", "numbers", remedy)
