"""A `.npy` file written row by row: under its temporary name until it is whole, and able to go on after a kill.

numpy leaves room in a file's header for the first dimension to grow, so rows are simply appended and the header is
written once more at the end."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile
from fairseq.files.atomic_io import make_parent, publish, read_json, temporary_path


class ArrayStream:
    """Appends rows of shape `row_shape` to `path`; `rows` of an earlier, unfinished run are kept."""

    def __init__(self, path: str, dtype: Any, row_shape: tuple[int, ...] = (), rows: int = 0) -> None:
        self.path, self.dtype, self.row_shape, self.rows = path, np.dtype(dtype), row_shape, rows
        make_parent(path)
        self._temporary = temporary_path(path)
        header = self._header()
        self._row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        end = len(header) + rows * self._row_bytes
        if rows and (not self._temporary.exists() or self._temporary.stat().st_size < end):
            raise BadFile(self._temporary, f"fewer than {rows} rows", f"{rows} rows of an earlier run", "delete it")
        self._stream = open(self._temporary, "r+b" if rows else "w+b")  # noqa: SIM115  (closed in finish and close)
        self._stream.truncate(end)
        self._stream.write(header)
        self._stream.seek(end)

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        layout = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, {**layout, "shape": (self.rows, *self.row_shape)})
        return buffer.getvalue()

    def append(self, rows: NDArray[Any]) -> None:
        """Adds rows (n, *row_shape), converted to the file's type."""
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        self._stream.write(np.ascontiguousarray(rows, self.dtype).data)
        self.rows += len(rows)

    def flush(self) -> None:
        """Makes the rows so far survive a kill."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Leaves the unfinished file for a later run."""
        self._stream.close()

    def finish(self) -> None:
        """Gives the file its name."""
        self._stream.seek(0)
        self._stream.write(self._header())
        self._stream.close()
        publish(self._temporary, self.path)


def rows_done(path: str, description: dict[str, Any]) -> int:
    """Rows that an unfinished run of the same `description` left safely on the disk, by its progress file `path`: that
    description and the number of "rows". 0 for anything else."""
    if not os.path.exists(path):
        return 0
    try:
        progress = read_json(path)
    except BadFile:
        return 0
    rows = progress.pop("rows", 0) if isinstance(progress, dict) else 0
    return rows if progress == description and isinstance(rows, int) and rows > 0 else 0


def open_array(path: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    """Maps a `.npy` file read-only; BadFile unless it has one of the `dtypes` and the `shape`. Nothing is executed."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        found = f"a file that cannot be opened ({error})"
        raise BadFile(path, found, "a numpy array", "make the folder again") from error
    if array.dtype.str not in dtypes or array.shape != shape:
        found, expected = f"{array.dtype.str} {array.shape}", f"{' or '.join(dtypes)} {shape}"
        raise BadFile(path, found, expected, "make the folder again")
    return array
