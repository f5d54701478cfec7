"""The legacy TorchNet format, written by `--dataset-impl lazy` and `cached` (the default of early fairseq).

`.idx`, little-endian: `TNTIDX` + two NULs | uint64 version 1 | uint64 dtype code | uint64 element size | uint64 n |
uint64 s | int64[n+1] dimension offsets | int64[n+1] data offsets in elements | int64[s] sizes. Item i has the shape
sizes[dim[i]:dim[i+1]]. `.bin` holds token id + 1 (Lua counts from one); readers subtract it again."""

from __future__ import annotations

import array
import contextlib
import math
import os
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.data.mmap_dataset import code, data_file_path, dtypes, index_file_path
from fairseq.errors import BadFile, UserError
from fairseq.files.atomic_io import delay_interrupts, publish, staged, temporary_path, writing
from fairseq.files.inputs import open_input, regular_size

MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<8sQQQQQ")


class IndexedDataset(SizedDataset):
    """`lazy`: each item is read from the disk when it is used. `sizes`: (n,) int64 item lengths."""

    def __init__(self, path: str, fix_lua_indexing: bool = False) -> None:
        super().__init__()
        self.path = path
        self.fix_lua_indexing = fix_lua_indexing
        self.data_file: IO[bytes] | None = None
        self._read_index()

    def _read_index(self) -> None:
        index, data = index_file_path(self.path), data_file_path(self.path)
        for file in (index, data):
            regular_size(file, "preprocess the text first")
        with open_input(index) as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            remedy = "check --dataset-impl or preprocess again"
            raise BadFile(index, f"a header starting {header[:8]!r}", f"{MAGIC!r}", remedy)
        _, version, dtype_code, self.element_size, self._len, s = HEADER.unpack(header)
        size, expected = os.path.getsize(index), HEADER.size + 8 * (2 * (self._len + 1) + s)
        if version != 1 or dtype_code not in dtypes or size != expected:
            found = f"version {version}, element type code {dtype_code} and {size} bytes"
            raise BadFile(index, found, f"version 1, a code from 1 to 10 and {expected} bytes", "preprocess again")
        self.dtype = np.dtype(dtypes[dtype_code]).newbyteorder("<")
        if self.element_size != self.dtype.itemsize:
            found = f"elements of {self.element_size} bytes"
            raise BadFile(index, found, f"{self.dtype.itemsize}, as their type has", "preprocess the text again")
        table = np.memmap(index, dtype="<i8", mode="r", offset=HEADER.size)
        self.dim_offsets, rest = table[: self._len + 1], table[self._len + 1 :]
        self.data_offsets, self.shapes = rest[: self._len + 1], rest[self._len + 1 :]
        end = int(self.data_offsets.max()) * self.dtype.itemsize
        ordered = (np.diff(self.data_offsets) >= 0).all() and (np.diff(self.dim_offsets) >= 0).all()
        if not ordered or self.dim_offsets[0] < 0 or self.dim_offsets[-1] > s or self.data_offsets[0] != 0:
            raise BadFile(index, "offsets out of order", "ascending ones", "preprocess the text again")
        if end != (size := regular_size(data)):
            remedy = f"the file is {'incomplete' if end > size else 'of another index'}: copy both or preprocess again"
            raise BadFile(data, f"{size} bytes", f"{end}, as {index} says", remedy)
        # Token items have one dimension, whose size is the item's length.
        self._sizes = np.diff(self.data_offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data_file": None}

    def __len__(self) -> int:
        return self._len

    def _read(self, start: int, end: int) -> np.ndarray:
        """Elements [start, end) of `.bin`, as stored."""
        if self.data_file is None:
            self.data_file = open(data_file_path(self.path), "rb", buffering=0)  # noqa: SIM115  (kept open)
        self.data_file.seek(start * self.dtype.itemsize)
        return np.frombuffer(self.data_file.read((end - start) * self.dtype.itemsize), dtype=self.dtype)

    def _item(self, i: int, stored: np.ndarray) -> torch.Tensor:
        shape = self.shapes[self.dim_offsets[i] : self.dim_offsets[i + 1]].tolist()
        if math.prod(shape) != stored.size or min(shape, default=0) < 0:
            found, expected = f"an item of shape {shape}", f"one of {stored.size} elements"
            raise BadFile(index_file_path(self.path), found, expected, "preprocess the text again")
        item = stored.astype(np.int64).reshape(shape)
        return torch.from_numpy(item - 1 if self.fix_lua_indexing else item)

    def _checked(self, i: int) -> int:
        if not 0 <= i < self._len:
            raise IndexError(f"item {i} of {self._len} in {self.path}")
        return int(i)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Item `i` as int64."""
        i = self._checked(i)
        return self._item(i, self._read(int(self.data_offsets[i]), int(self.data_offsets[i + 1])))

    @property
    def sizes(self) -> np.ndarray:
        """Item lengths in elements: (n,) int64."""
        return self._sizes

    @staticmethod
    def exists(path: str) -> bool:
        """Whether both files of a split are there."""
        return os.path.exists(index_file_path(path)) and os.path.exists(data_file_path(path))


class IndexedCachedDataset(IndexedDataset):
    """`cached`: `prefetch` loads an epoch's items into memory; others are still read from the disk."""

    def __init__(self, path: str, fix_lua_indexing: bool = False) -> None:
        super().__init__(path, fix_lua_indexing)
        self.cache: np.ndarray = np.empty(0, self.dtype)
        self._cached = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)

    @property
    def supports_prefetch(self) -> bool:
        return True

    def prefetch(self, indices: Sequence[int]) -> None:
        """Holds exactly these items in memory."""
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        if np.isin(wanted, self._cached).all():
            return
        ends = np.cumsum(self._sizes[wanted])
        self._cached, self._starts = wanted, ends - self._sizes[wanted]
        self.cache = np.empty(int(ends[-1]), self.dtype)
        # Neighbours in the file are read together.
        breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
        for run in np.split(np.arange(len(wanted)), breaks):
            first, last = run[0], run[-1]
            stored = self._read(int(self.data_offsets[wanted[first]]), int(self.data_offsets[wanted[last] + 1]))
            self.cache[self._starts[first] : ends[last]] = stored

    def __getitem__(self, i: int) -> torch.Tensor:
        i = self._checked(i)
        k = int(np.searchsorted(self._cached, i))
        if k == len(self._cached) or self._cached[k] != i:
            return super().__getitem__(i)
        return self._item(i, self.cache[self._starts[k] : self._starts[k] + self._sizes[i]])


class IndexedDatasetBuilder:
    """Writes the legacy format. `.bin` and `.idx` appear under their names only when whole."""

    def __init__(self, out_file: str, dtype: Any = np.int32) -> None:
        self._out_file = out_file
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.data_offsets, self.dim_offsets, self.sizes = (array.array("q", start) for start in ([0], [0], []))
        self._closing = contextlib.ExitStack()
        self._data: IO[bytes] = self._closing.enter_context(staged(out_file))

    def add_item(self, tensor: torch.Tensor | np.ndarray) -> None:
        """Appends one item of any shape; its elements are stored plus one."""
        values = np.asarray(tensor)
        with writing(self._out_file):
            self._data.write((values + 1).astype(self.dtype).tobytes())
        self.data_offsets.append(self.data_offsets[-1] + values.size)
        self.sizes.extend(values.shape)
        self.dim_offsets.append(self.dim_offsets[-1] + values.ndim)

    def add_items(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """Appends many 1-D items at once: their elements back to back, and their lengths."""
        with writing(self._out_file):
            self._data.write((values.astype(np.int64) + 1).astype(self.dtype).tobytes())
        sizes = np.asarray(sizes, dtype=np.int64)
        self.data_offsets.frombytes((self.data_offsets[-1] + np.cumsum(sizes)).tobytes())
        self.dim_offsets.frombytes((self.dim_offsets[-1] + np.arange(1, len(sizes) + 1)).tobytes())
        self.sizes.frombytes(sizes.tobytes())

    def merge_file_(self, another_file: str) -> None:
        """Appends the items of another finished dataset (path without extension) of the same element type."""
        other = IndexedDataset(another_file)
        if other.dtype != self.dtype:
            raise BadFile(index_file_path(another_file), f"elements of type {other.dtype}", f"{self.dtype}")
        begin, dims = self.data_offsets[-1], self.dim_offsets[-1]
        self.data_offsets.frombytes((begin + other.data_offsets[1:]).tobytes())
        self.dim_offsets.frombytes((dims + other.dim_offsets[1:]).tobytes())
        self.sizes.frombytes(other.shapes.tobytes())
        for i in range(0, int(other.data_offsets[-1]), 1 << 22):
            with writing(self._out_file):
                self._data.write(other._read(i, min(i + (1 << 22), int(other.data_offsets[-1]))).tobytes())

    def finalize(self, index_file: str) -> None:
        """Writes `.idx` and names both files. A stale `.idx` goes first, so that no mixed pair is ever visible."""
        n, s = len(self.data_offsets) - 1, len(self.sizes)
        stream = self._closing.enter_context(staged(index_file))
        with writing(index_file):
            stream.write(HEADER.pack(MAGIC, 1, code(self.dtype), self.dtype.itemsize, n, s))
            for column in (self.dim_offsets, self.data_offsets, self.sizes):
                stream.write(np.frombuffer(column, dtype=np.int64).astype("<i8").tobytes() if column else b"")
        self._closing.close()
        with delay_interrupts():
            with contextlib.suppress(FileNotFoundError):
                os.remove(index_file)
            publish(temporary_path(self._out_file), self._out_file)
            publish(temporary_path(index_file), index_file)

    def abandon(self) -> None:
        """Gives up: the temporary file is removed and nothing appears."""
        self._closing.__exit__(UserError, UserError("abandoned"), None)
