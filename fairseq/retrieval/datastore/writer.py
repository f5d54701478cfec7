"""Writing a datastore row by row, resumably. Rows are written to temporary files; a progress file records how many of
them have been flushed to disk, and a later run of the same command continues after these. The files are renamed when
complete, and the sidecar is written last."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import UserError
from fairseq.files.array_stream import RowDigest
from fairseq.files.atomic_io import (
    delay_interrupts,
    open_temporary,
    publish,
    require_free_space,
    require_replaceable,
    take_over_temporary,
    temporary_path,
    writing,
)
from fairseq.files.checksums import describe_content
from fairseq.files.inputs import open_input
from fairseq.files.output_lock import exclusive
from fairseq.files.progress import read_progress, rows_noted, warn_of_other_run, write_progress
from fairseq.files.sidecar import remove_sidecar, write_sidecar
from fairseq.retrieval.datastore.layout import keys_path, values_path
from fairseq.retrieval.datastore.raw_arrays import KEY_DTYPES, VALUE_DTYPES
from fairseq.retrieval.datastore.reader import KIND

logger = logging.getLogger(__name__)

SAFE_POINT_SECONDS = 30.0


class DatastoreWriter:
    """Appends up to `rows` rows. An unfinished run is continued if its `identity` (model, data, flags) is the same.

    value_bytes: 8 (int64, as the original) or 4.
    Use: writer = DatastoreWriter(...); skip the first `writer.written` rows; `append` the others; `finish`."""

    def __init__(
        self, prefix: str, rows: int, dimension: int, fp16: bool, identity: dict[str, Any], value_bytes: int = 8
    ) -> None:
        self.prefix, self.rows, self.dimension = prefix, rows, dimension
        self.key_dtype = np.dtype(KEY_DTYPES[2 if fp16 else 4])
        self.value_dtype = np.dtype(VALUE_DTYPES[value_bytes])
        self.identity = {**identity, "rows": rows, "dimension": dimension, "key_dtype": self.key_dtype.str}
        self.written = 0
        self._last_safe_point = time.monotonic()
        self._progress = prefix + ".progress.json"
        self._names = (keys_path(prefix), values_path(prefix))
        self._paths = tuple(temporary_path(name) for name in self._names)
        self._digests = [RowDigest(), RowDigest()]
        self._row_bytes = (dimension * self.key_dtype.itemsize, self.value_dtype.itemsize)
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(exclusive(prefix))
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        prefix, rows = self.prefix, self.rows
        for name in self._names:
            require_replaceable(name)
        self._resume()
        if os.path.exists(values_path(prefix)):
            logger.warning("%s: the datastore that is there will be replaced when this one is complete", prefix)
        try:
            require_free_space(prefix, (rows - self.written) * sum(self._row_bytes), "the datastore")
        except UserError:
            self._remove_if_empty()
            raise
        self._files = [open_temporary(path, "r+b") for path in self._names]
        for stream, row_bytes, path in zip(self._files, self._row_bytes, self._names, strict=True):
            with writing(path):
                stream.truncate(self.written * row_bytes)
                stream.seek(0, os.SEEK_END)

    def _resume(self) -> None:
        """Continues after the flushed rows of an unfinished run with the same identity, else starts from the
        beginning."""
        if os.path.exists(self._progress):
            progress = read_progress(self._progress)
            safe = rows_noted(progress, "written")
            if safe and progress.get("identity") == self.identity:
                if progress.get("finishing"):
                    self._take_back()
                if safe <= self.rows and self._take_over(safe, progress.get("digests")):
                    self.written = safe
                    return
                logger.warning("%s: rows that differ from those that were written; saving all again", self.prefix)
                self._digests = [RowDigest(), RowDigest()]
            else:
                warn_of_other_run(self._progress, progress)
            os.unlink(self._progress)  # of another run, which must not continue from this run's rows
        for name in self._names:
            open_temporary(name).close()

    def _take_over(self, rows: int, digests: Any) -> bool:
        """Whether the first `rows` rows of the temporary files have these digests; reads the rows once."""
        adopted = [take_over_temporary(name) for name in self._names]
        if not all(adopted):
            return False
        for path, row_bytes, digest in zip(self._paths, self._row_bytes, self._digests, strict=True):
            with open_input(path) as stream:
                digest.add_from(stream, rows * row_bytes)
        return bool(digests == [digest.text() for digest in self._digests])

    def _take_back(self) -> None:
        """Undoes the renaming of an earlier run that was killed between the first file and the second."""
        for path, row_bytes in zip(self._names, self._row_bytes, strict=True):
            size = self.rows * row_bytes
            if not take_over_temporary(path) and os.path.isfile(path) and os.path.getsize(path) == size:
                os.replace(path, temporary_path(path))

    def _remove_if_empty(self) -> None:
        if not self.written:
            for path in self._paths:
                path.unlink()

    @property
    def rows_left(self) -> int:
        """Number of rows that can still be appended."""
        return self.rows - self.written

    def append(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Appends keys (n, D) and values (n,), of which those beyond `rows` are dropped; UserError when keys are not
        finite or have another width."""
        keys, values = keys[: self.rows_left], values[: self.rows_left]
        if keys.shape != (len(values), self.dimension):
            raise UserError(
                f"{keys_path(self.prefix)}: found keys of the shape {keys.shape} for {len(values)} values, expected "
                f"{self.dimension} numbers each, which the model announced; save with another model"
            )
        converted = keys.astype(self.key_dtype)
        if not np.isfinite(converted).all():
            raise UserError(
                f"{keys_path(self.prefix)}: a key near row {self.written} is infinite or not a number in "
                f"{self.key_dtype.name}; save without --dstore-fp16 or check the model"
            )
        with writing(keys_path(self.prefix)):
            parts = (converted, values.astype(self.value_dtype))
            for part, stream, digest in zip(parts, self._files, self._digests, strict=True):
                content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                stream.write(content)
                digest.add(content)
        self.written += len(values)
        if time.monotonic() - self._last_safe_point > SAFE_POINT_SECONDS:
            self.safe_point()

    def safe_point(self) -> None:
        """Flushes all rows to disk and records them in the progress file, so that they survive a kill."""
        with writing(keys_path(self.prefix)):
            for stream in self._files:
                stream.flush()
                os.fsync(stream.fileno())
        self._note_progress()
        self._last_safe_point = time.monotonic()

    def _note_progress(self, **more: bool) -> None:
        digests = [digest.text() for digest in self._digests]
        state = {"identity": self.identity, "written": self.written, "digests": digests}
        write_progress(self._progress, {**state, **more})

    def close(self) -> None:
        """Leaves an unfinished datastore in a state from which the same command continues; removes an empty one."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._files[0].closed:
            return
        if not self.written:
            for stream in self._files:
                with contextlib.suppress(OSError):
                    stream.close()
            self._remove_if_empty()
            return
        try:
            self.safe_point()
        finally:
            for stream in self._files:
                with contextlib.suppress(OSError):  # a full disk, which is what stopped the run
                    stream.close()

    def finish(self, info: dict[str, Any], staged: dict[str, str] | None = None) -> None:
        """Pads with zero rows to the requested size (as in the original), renames the files, writes the sidecar with
        the fields `info`. staged: name -> path of further files of the datastore that are written under temporary
        names."""
        self._finish(info, staged or {})
        self._lock.close()

    def _finish(self, info: dict[str, Any], staged: dict[str, str]) -> None:
        filled = self.written
        with writing(keys_path(self.prefix)):
            for stream, row_bytes in zip(self._files, self._row_bytes, strict=True):
                stream.flush()
                stream.truncate(self.rows * row_bytes)
                os.fsync(stream.fileno())
                stream.close()
        files = {"keys": keys_path(self.prefix), "values": values_path(self.prefix), **staged}
        content = {name: describe_content(temporary_path(path)) for name, path in files.items()}
        self._note_progress(finishing=True)
        description = {
            "rows": self.rows,
            "filled_rows": filled,
            "dimension": self.dimension,
            "key_dtype": self.key_dtype.str,
            "value_dtype": self.value_dtype.str,
            "content": content,
        }
        with delay_interrupts():
            remove_sidecar(self.prefix)
            for path in files.values():
                publish(temporary_path(path), path)
            write_sidecar(self.prefix, KIND, {**info, **description})
        if os.path.exists(self._progress):
            os.unlink(self._progress)
