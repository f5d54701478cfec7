"""Infers the type of numbers in a raw file from its bytes. Datastore files have no header, and a length that fits
proves little: an int32 file is as long as an int64 file of half as many values. But token numbers are small, and they
are not small when read as a wider type, with another byte order or as floating point. Coordinates of a vector have
similar sizes, and when read as another type their sizes are spread over many powers of two. A sample from all over the
file is examined.

Files with a NumPy header are read according to it; other containers are refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile

VALUE_DTYPES = {8: "<i8", 4: "<i4", 2: "<i2"}
KEY_DTYPES = {2: "<f2", 4: "<f4"}
LARGEST_TOKEN = {"<i8": 1 << 31, "<i4": 1 << 20, "<i2": 1 << 15}  # larger numbers are not token numbers
NAMES = {"<i8": "int64", "<i4": "int32", "<i2": "int16", "<f2": "float16", "<f4": "float32", "<f8": "float64"}
NAMES |= {">" + code[1:]: f"big-endian {name}" for code, name in NAMES.items()}
CONTAINERS = {
    b"PK\x03\x04": "a zip archive, as np.savez and torch.save write",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b\x08": "a file compressed by gzip",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
}
MAGIC = b"\x93NUMPY"
PIECES, PIECE = 64, 8192  # bytes of each piece of a sample
FEW = 16  # fewer numbers than this are not enough to infer a type
USUAL_SIZE = 20  # coordinates of a vector typically are within 2^-20 and 2^20
CLEAR = 1.5  # difference of `spread` between two types from which on the smaller one is certain
ORDERLY = 5.0  # largest `spread` of numbers that are plausible as vectors
FLOATS = ("<f2", "<f4", ">f2", ">f4", "<f8", ">f8")
COPY = "copy the file again, or save the datastore again"


@dataclass(frozen=True)
class Header:
    """The NumPy header of a file: type, shape, and the offset of the numbers in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: str) -> Header | None:
    """The NumPy header of a file, None for raw numbers; BadFile for a header that cannot be used, and for containers
    of other kinds."""
    with open(path, "rb") as stream:
        start = stream.read(8)
        for magic, name in CONTAINERS.items():
            if start.startswith(magic):
                raise BadFile(path, name, "raw numbers", "take the array out of it and write it with tofile")
        if not start.startswith(MAGIC):
            return None
        stream.seek(0)
        try:
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            major, _ = np.lib.format.read_magic(stream)
            shape, fortran, dtype = read[major](stream)
        except Exception as error:  # NumPy's parser may raise exceptions of any kind
            found = "a NumPy header that cannot be read"
            raise BadFile(path, found, "a header of version 1 or 2, or none", COPY) from error
        if fortran and len(shape) > 1 and min(shape) > 1:
            raise BadFile(path, "a NumPy header with columns one after the other", "rows", "save it in C order")
        return Header(dtype.str, shape, stream.tell())


def number_bytes(path: str, header: Header | None) -> int:
    """Size in bytes of the numbers without the header; BadFile when it is not the size that the header gives."""
    size = os.path.getsize(path)
    if header is None:
        return size
    found, expected = size - header.offset, int(np.prod(header.shape, dtype=object)) * np.dtype(header.dtype).itemsize
    if found != expected:
        raise BadFile(path, f"{found} bytes of numbers", f"{expected} as the file's own NumPy header says", COPY)
    return found


def sample_bytes(path: str, offset: int = 0) -> NDArray[np.uint8]:
    """Pieces from all over a file, each of which starts a multiple of 8 bytes after `offset`."""
    size = os.path.getsize(path) - offset
    starts = range(0, size, PIECE) if size <= PIECES * PIECE else np.linspace(0, size - PIECE, PIECES).astype(int)
    with open(path, "rb") as stream:
        parts = []
        for start in starts:
            stream.seek(offset + int(start) // 8 * 8)
            parts.append(np.frombuffer(stream.read(PIECE), np.uint8))
    whole = [part for part in parts if len(part)]
    return np.concatenate(whole) if whole else np.zeros(0, np.uint8)


def _numbers(sample: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    itemsize = np.dtype(dtype).itemsize
    return sample[: len(sample) // itemsize * itemsize].view(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Token numbers


def are_tokens(sample: NDArray[np.uint8], dtype: str) -> bool:
    """Whether a sample may consist of token numbers of the integer type `dtype`: all numbers are in range, and they are
    not halves of wider numbers (then every second one would be an upper half, and all upper halves would be equal)."""
    numbers = _numbers(sample, dtype)
    native = "<" + dtype[1:]
    if not ((numbers >= 0) & (numbers < LARGEST_TOKEN[native])).all():
        return False
    if native == "<i8" or len(numbers) < FEW:
        return True
    of_one = [bool((numbers[start::2] == numbers[start]).all()) for start in (0, 1)]
    return not any(of_one) or bool((numbers == numbers[0]).all())


def token_types(sample: NDArray[np.uint8]) -> list[str]:
    """The integer types with which a sample may consist of token numbers, the widest, which is the likeliest, first."""
    return [dtype for dtype in VALUE_DTYPES.values() if are_tokens(sample, dtype)]


def foreign_tokens(sample: NDArray[np.uint8]) -> str | None:
    """The type, among those that datastores do not use, with which a sample consists of token numbers; None when there
    is none."""
    for dtype in ("<f4", "<f8"):
        numbers = _numbers(sample, dtype)
        with np.errstate(invalid="ignore"):
            if len(numbers) and numbers.any() and ((numbers >= 0) & (numbers < 1 << 24) & (numbers % 1 == 0)).all():
                return dtype
    return next((dtype for dtype in (">i8", ">i4") if are_tokens(sample, dtype)), None)


def no_tokens(path: str, sample: NDArray[np.uint8], dtype: str) -> BadFile:
    """The error for a file whose sample does not consist of token numbers of type `dtype`."""
    other = foreign_tokens(sample)
    expected = "token numbers from 0 on, as little-endian int64, int32 or int16"
    if other is not None:
        return BadFile(path, f"numbers that are tokens as {NAMES[other]}", expected, "convert the file")
    numbers = _numbers(sample, dtype)
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    return BadFile(path, f"numbers from {low} to {high} as {NAMES[dtype]}", expected, COPY)


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates of vectors


def spread(sample: NDArray[np.uint8], dtype: str) -> float:
    """How widely the sizes of numbers are spread when a sample is read as `dtype`: the standard deviation of their
    base-2 logarithms, increased for unusual sizes and for numbers that are not finite. Zeros are left out. Infinity
    when too few other numbers remain, or when every second number is zero, as in halves of wider numbers."""
    read = _numbers(sample, dtype)
    with np.errstate(invalid="ignore"):
        numbers = read.astype(np.float64)
    finite, some = np.isfinite(numbers), numbers != 0
    sizes = np.log2(np.abs(numbers[finite & some]))
    if len(sizes) < FEW or not (some[::2].any() and some[1::2].any()):
        return np.inf
    unusual = max(0.0, abs(float(np.median(sizes))) - USUAL_SIZE)
    return float(sizes.std()) + unusual + 100 * float(1 - finite.mean())


def vector_type(path: str, sample: NDArray[np.uint8], among: tuple[str, ...]) -> str | None:
    """The type in `among` of a sample of vectors; None when it cannot be inferred from the bytes. BadFile when they
    clearly are numbers of another type."""
    spreads = sorted((spread(sample, dtype), dtype) for dtype in FLOATS)
    (least, best), (second, _) = spreads[:2]
    if not np.isfinite(least) or second - least < CLEAR:
        return None
    if best not in among:
        raise _other_vectors(path, best)
    return best


def check_vectors(path: str, sample: NDArray[np.uint8], dtype: str) -> None:
    """BadFile when a sample of keys that should have type `dtype` clearly has another type. Keys most of which are not
    finite are not examined here; they are refused when they are read."""
    if len(sample) == 0 or np.isfinite(_numbers(sample, dtype)).mean() < 0.5:
        return
    least, other = min((spread(sample, other), other) for other in FLOATS if other != dtype)
    if least < ORDERLY and spread(sample, dtype) > 2 * least + CLEAR:
        raise _other_vectors(path, other, dtype)


def _other_vectors(path: str, found: str, expected: str | None = None) -> BadFile:
    wanted = "float16 or float32" if expected is None else NAMES[expected]
    remedy = "check the width and precision that were given, or convert the file"
    return BadFile(path, f"numbers that are those of vectors as {NAMES[found]}", f"little-endian {wanted} keys", remedy)
