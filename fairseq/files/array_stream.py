"""A `.npy` file, or the same without a header, written row by row, under its temporary name until it is complete, which
can be continued after a kill.

numpy pads a file's header so that the first dimension can grow; rows are therefore appended, and the header is written
again at the end. A stream computes a digest of the rows so far. A run that continues compares it, and keeps all rows or
none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile
from fairseq.files.array_files import map_array
from fairseq.files.atomic_io import (
    discard,
    open_temporary,
    publish,
    require_replaceable,
    take_over_temporary,
    temporary_path,
    writing,
)
from fairseq.files.checksums import describe_content
from fairseq.files.folders import make_parent
from fairseq.files.progress import read_progress, rows_noted, warn_of_other_run

READ = 1 << 22
REMEDY = "delete the folder and make it again"


class RowDigest:
    """A running digest of the bytes appended to a file."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, rows: Any) -> None:
        """Adds the bytes of some rows."""
        self._state.update(rows)

    def add_from(self, stream: IO[bytes], count: int) -> None:
        """Adds the next `count` bytes of a file, or all remaining bytes if there are fewer."""
        while count and (block := stream.read(min(READ, count))):
            self._state.update(block)
            count -= len(block)

    def text(self) -> str:
        """The digest in the form in which progress files store it."""
        return self._state.hexdigest()


class ArrayStream:
    """Appends rows of shape `row_shape` to `path`, after the first `rows` rows of an unfinished run; BadFile when these
    do not have the digest `digest`. raw: the file has no header."""

    def __init__(
        self,
        path: str,
        dtype: Any,
        row_shape: tuple[int, ...] = (),
        rows: int = 0,
        digest: str | None = None,
        raw: bool = False,
    ) -> None:
        self.path, self.dtype, self.row_shape, self.rows = path, np.dtype(dtype), row_shape, rows
        self._raw = raw
        make_parent(path)
        self._temporary = temporary_path(path)
        self.finished = False
        header = self._header()
        self._row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        end = len(header) + rows * self._row_bytes
        if rows and (not take_over_temporary(path) or self._temporary.stat().st_size < end):
            raise BadFile(self._temporary, f"fewer than {rows} rows", f"{rows} rows of an earlier run", "delete it")
        require_replaceable(path)
        with writing(path):
            self._stream = open_temporary(path, "r+b" if rows else "w+b")
        self._digest = RowDigest()
        if rows:
            self._stream.seek(len(header))
            self._digest.add_from(self._stream, rows * self._row_bytes)
            if self._digest.text() != digest:
                self._stream.close()
                found, expected = "rows that differ from those that were written", f"{rows} rows of an earlier run"
                raise BadFile(self._temporary, found, expected, "delete it")
            self._stream.seek(0)
        with writing(path):
            self._stream.truncate(end)
            self._stream.write(header)
            self._stream.seek(end)

    def _header(self) -> bytes:
        if self._raw:
            return b""
        buffer = io.BytesIO()
        layout = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, {**layout, "shape": (self.rows, *self.row_shape)})
        return buffer.getvalue()

    def append(self, rows: NDArray[Any]) -> None:
        """Appends rows (n, *row_shape), converted to the file's type."""
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        content = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        with writing(self.path):
            self._stream.write(content)
        self._digest.add(content)
        self.rows += len(rows)

    def flush(self) -> None:
        """Flushes all rows to disk, so that they survive a kill."""
        with writing(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Leaves the unfinished file for a later run."""
        with contextlib.suppress(OSError):  # a full disk, which is what stopped the run
            self._stream.close()

    @property
    def digest(self) -> str:
        """The digest of the rows so far."""
        return self._digest.text()

    def abandon(self) -> None:
        """Gives up: the temporary file is removed."""
        self.close()
        discard([self._temporary])

    def finish(self) -> dict[str, Any]:
        """Renames the file to its final name; returns its digests for a sidecar."""
        with writing(self.path):
            self._stream.seek(0)
            self._stream.write(self._header())
            self._stream.close()
        content = describe_content(self._temporary)
        publish(self._temporary, self.path)
        self.finished = True
        return content


def progress(description: dict[str, Any], streams: Sequence[ArrayStream]) -> dict[str, Any]:
    """The content of a progress file for `streams`, which have been flushed, of the run `description`."""
    return {**description, "rows": streams[0].rows, "digests": [stream.digest for stream in streams]}


def rows_done(path: str, description: dict[str, Any], streams: int = 1) -> tuple[int, list[str]]:
    """(rows, their digest in each of the streams) of an unfinished run with the same `description`, from its progress
    file `path`; 0 rows when there is none."""
    noted = read_progress(path)
    rows, digests = rows_noted(noted, "rows"), noted.get("digests")
    same = noted == {**description, "rows": rows, "digests": digests}
    if rows and same and isinstance(digests, list) and len(digests) == streams:
        return rows, digests
    warn_of_other_run(path, noted)
    return 0, [""] * streams


def open_array(path: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-maps a `.npy` file read-only; BadFile unless it has one of the `dtypes` and the `shape`. No code is
    run."""
    array = map_array(path, REMEDY)
    if array.dtype.str not in dtypes or array.shape != shape or not array.flags.c_contiguous:
        found, expected = f"{array.dtype.str} {array.shape}", f"{' or '.join(dtypes)} {shape}"
        raise BadFile(path, found, expected, REMEDY)
    return array
