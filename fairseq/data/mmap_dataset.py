"""The mmap format, the default of preprocess: `.bin` holds the items back to back, `.idx` their lengths and offsets.

`.idx`, little-endian: `MMIDIDX` + two NULs | uint64 version 1 | uint8 dtype code | uint64 n | int32[n] lengths in
elements | int64[n] byte offsets into `.bin`. `.bin` has no header. Both files are checked against each other on
opening, so that a truncated copy is one clear sentence and not a wrong token."""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.errors import BadFile, UserError
from fairseq.files.atomic_io import delay_interrupts, publish, staged, temporary_path, writing
from fairseq.files.inputs import open_input, regular_size
from fairseq.refusals import refuse

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQ")

# The code stored in .idx -> element type. 6 and 7 are both float64: 6 was written for Python's float.
dtypes: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}


def code(dtype: Any) -> int:
    """The code of an element type: `code(np.uint16)` is 8."""
    for key in (7, *dtypes):
        if np.dtype(dtypes[key]) == np.dtype(dtype):
            return key
    raise ValueError(f"element type {np.dtype(dtype)} has no code in the .idx format")


def index_file_path(prefix_path: str) -> str:
    """Path of the index beside the data."""
    return prefix_path + ".idx"


def data_file_path(prefix_path: str) -> str:
    """Path of the elements."""
    return prefix_path + ".bin"


def read_index(path: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Reads an mmap `.idx`: element type, int32 lengths (n,), int64 byte offsets (n,), the arrays memory-mapped."""
    size = regular_size(path)
    with open_input(path) as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise BadFile(
            path, f"a header starting {header[:9]!r}", repr(MAGIC), "check --dataset-impl or preprocess again"
        )
    _, version, dtype_code, n = HEADER.unpack(header)
    if version != VERSION:
        raise BadFile(path, f"version {version}", f"version {VERSION}", "preprocess the text again")
    if dtype_code not in dtypes:
        raise BadFile(path, f"element type code {dtype_code}", "a code from 1 to 10", "preprocess the text again")
    if size != HEADER.size + 12 * n:
        expected = f"{HEADER.size + 12 * n} bytes for the {n} items it announces"
        raise BadFile(path, f"{size} bytes", expected, "the file is incomplete: copy it or preprocess again")
    if n == 0:
        return np.dtype(dtypes[dtype_code]), np.empty(0, np.int32), np.empty(0, np.int64)
    table = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)
    dtype = np.dtype(dtypes[dtype_code]).newbyteorder("<")
    return dtype, table[: 4 * n].view("<i4"), table[4 * n :].view("<i8")


def write_index(stream: IO[bytes], sizes: np.ndarray, dtype: np.dtype) -> None:
    """Writes the content of an `.idx`: items of `sizes` (n,) elements of type `dtype`, back to back."""
    stream.write(HEADER.pack(MAGIC, VERSION, code(dtype), len(sizes)))
    stream.write(sizes.astype("<i4").data)
    for offsets in _offsets(sizes, dtype.itemsize):
        stream.write(offsets.astype("<i8").data)


class MMapIndexedDataset(SizedDataset):
    """Items of a binarised split, read through a memory map.

    `tokens`: the whole stream, flat, in the element type of the file. `sizes`: (n,) int32 item lengths.
    `contiguous`: whether the items follow each other in `tokens` without gaps, as every known writer lays them out."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._open(path)

    def _open(self, path: str) -> None:
        self._path = path
        index, data = index_file_path(path), data_file_path(path)
        for file in (index, data):
            regular_size(file, "preprocess the text first")
        self.dtype, self._sizes, self._pointers = read_index(index)
        width = self.dtype.itemsize
        size = os.path.getsize(data)
        end, self.contiguous, i = 0, True, 0
        for offsets in _offsets(self._sizes, width):
            lengths, pointers = self._sizes[i : i + len(offsets)], self._pointers[i : i + len(offsets)]
            if lengths.min() < 0 or pointers.min() < 0:
                raise BadFile(index, "a negative length or offset", "none", "preprocess the text again")
            pointers = np.minimum(pointers, size + 1)  # beyond the file is beyond; the sum below must not overflow
            end = max(end, int((pointers + lengths.astype(np.int64) * width).max()))
            self.contiguous = self.contiguous and np.array_equal(offsets, pointers)
            i += len(offsets)
        if end != size:  # beyond its end, sums of offsets and lengths are not exact
            remedy = f"the file is {'incomplete' if end > size else 'of another index'}: copy both or preprocess again"
            raise BadFile(data, f"{size} bytes", f"{'more' if end > size else end}, as {index} says", remedy)
        if not self.contiguous:  # both say where an item is, and no writer is known that leaves gaps
            found, remedy = "offsets that are not the sums of the lengths", "copy it again or preprocess the text again"
            refuse(BadFile(index, found, "items back to back", remedy + ", or go on with --force"))
        self.tokens: np.ndarray = np.empty(0, self.dtype)
        if size >= width:
            self.tokens = np.memmap(data, dtype=self.dtype, mode="r", shape=(size // width,))

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, state: str) -> None:
        self._open(state)

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Part of an item, from element `offset` on, as a view of the map."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"item {idx} of {len(self)} in {self._path}")
        size = int(self._sizes[idx])
        start = int(self._pointers[idx]) // self.dtype.itemsize
        if self._pointers[idx] % self.dtype.itemsize:
            found = f"offset {self._pointers[idx]}"
            raise BadFile(index_file_path(self._path), found, "a multiple of the element size")
        stop = size if length is None else min(size, offset + length)
        return self.tokens[start + offset : start + stop]

    def __getitem__(self, idx: int) -> torch.Tensor:
        """Item `idx` as (size,) int64 (float64 for floating-point files)."""
        item = self.get(int(idx))
        return torch.from_numpy(item.astype(np.int64 if item.dtype.kind in "iu" else np.float64))

    def token_range(self, start: int, end: int) -> np.ndarray:
        """Elements [start, end) of the concatenated items; needs `contiguous`."""
        return self.tokens[start:end]

    @property
    def sizes(self) -> np.ndarray:
        """Item lengths in elements: (n,) int32."""
        return self._sizes

    @staticmethod
    def exists(path: str) -> bool:
        """Whether both files of a split are there."""
        return os.path.exists(index_file_path(path)) and os.path.exists(data_file_path(path))


class MMapIndexedDatasetBuilder:
    """Writes `.bin` while items arrive, and `.idx` at the end. Both appear under their names only when whole.

    Memory: four bytes per item (its length)."""

    def __init__(self, out_file: str, dtype: Any = np.int64) -> None:
        self._out_file = out_file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._sizes = array.array("i")
        self._closing = contextlib.ExitStack()
        self._data: IO[bytes] = self._closing.enter_context(staged(out_file))

    def add_item(self, tensor: torch.Tensor | np.ndarray) -> None:
        """Appends one item."""
        values = np.asarray(tensor)
        self.add_items(values, np.array([values.size]))

    def add_items(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """Appends many items at once: their elements back to back, and their lengths."""
        limits = np.iinfo(self._dtype) if self._dtype.kind in "iu" else None
        if limits and values.size and (values.min() < limits.min or values.max() > limits.max):
            raise UserError(f"{self._out_file}: values up to {values.max()} do not fit {self._dtype.name}")
        with writing(self._out_file):
            self._data.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.add_sizes(sizes)

    def add_sizes(self, sizes: np.ndarray) -> None:
        """Notes the lengths of items whose elements `stream` received directly."""
        self._sizes.frombytes(np.ascontiguousarray(sizes, dtype=np.int32).tobytes())

    def merge_file_(self, another_file: str) -> None:
        """Appends the items of another finished dataset (path without extension) of the same element type."""
        other = MMapIndexedDataset(another_file)
        if other.dtype != self._dtype:
            raise BadFile(index_file_path(another_file), f"elements of type {other.dtype}", f"{self._dtype}")
        if not other.contiguous:
            raise BadFile(index_file_path(another_file), "items with gaps between them", "items back to back")
        with open(data_file_path(another_file), "rb") as stream, writing(self._out_file):
            shutil.copyfileobj(stream, self._data, 16 << 20)
        self.add_sizes(other.sizes)

    def finalize(self, index_file: str) -> None:
        """Writes `.idx` and names both files. A stale `.idx` goes first, so that no mixed pair is ever visible."""
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        stream = self._closing.enter_context(staged(index_file))
        with writing(index_file):
            write_index(stream, sizes, self._dtype)
        self._closing.close()
        with delay_interrupts():
            with contextlib.suppress(FileNotFoundError):
                os.remove(index_file)
            publish(temporary_path(self._out_file), self._out_file)
            publish(temporary_path(index_file), index_file)

    def abandon(self) -> None:
        """Gives up: the temporary file is removed and nothing appears."""
        self._closing.__exit__(UserError, UserError("abandoned"), None)


def _offsets(sizes: np.ndarray, width: int, step: int = 1 << 20) -> Iterator[np.ndarray]:
    """Byte offsets of items that follow each other, in pieces of `step` items."""
    position = 0
    for i in range(0, len(sizes), step):
        ends = position + np.cumsum(sizes[i : i + step], dtype=np.int64) * width
        yield np.concatenate(([position], ends[:-1]))
        position = int(ends[-1])
