"""What k-means keeps on disk so that a killed run goes on: its arrays in one file, replaced as a whole, and the
clusters of keys in a second one that only grows. A second run with the same recipe and datastore takes both over and
ends with the bytes that an undisturbed run would have written."""

from __future__ import annotations

import json
import os
import time
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.files.atomic_io import atomic_write, writing

SAFE_POINT_SECONDS = 30.0
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError)
UNREADABLE += (SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # what numpy may raise
MOST_OF_THE_TIME = 10  # a safe point may take a tenth of the time between two of them


class KMeansState:
    """Arrays by name, as `keep` last wrote them. Without a prefix nothing touches the disk.

    Files: `PREFIX.kmeans.tmp` (an .npz with the identity in it), `PREFIX.assignment.tmp` (int32, one a key)."""

    def __init__(self, prefix: str | None = None, identity: dict[str, Any] | None = None) -> None:
        self.path = None if prefix is None else prefix + ".kmeans.tmp"
        self.assignment_path = None if prefix is None else prefix + ".assignment.tmp"
        self.identity = json.dumps(identity or {}, sort_keys=True)
        self.arrays: dict[str, NDArray[Any]] = self._read()
        if not self.arrays:
            self.clear()  # of another recipe's run
        self._interval = SAFE_POINT_SECONDS
        self._last = time.monotonic()

    def _read(self) -> dict[str, NDArray[Any]]:
        """The arrays of an earlier run of the same identity; none when there are none, or they cannot be read."""
        if self.path is None or not os.path.exists(self.path):
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except UNREADABLE:
            return {}
        return arrays if str(arrays.pop("identity", "")) == self.identity else {}

    def keep(self, final: bool = False, **arrays: Any) -> None:
        """Replaces what is kept by `arrays`; writes it when the last safe point is long ago, or at once if `final`."""
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if self.path is None or not (final or self.due):
            return
        now = time.monotonic()
        with atomic_write(self.path) as stream:
            np.savez(stream, identity=np.asarray(self.identity), **self.arrays)  # type: ignore[arg-type]
        self._last = time.monotonic()
        self._interval = max(SAFE_POINT_SECONDS, MOST_OF_THE_TIME * (self._last - now))

    @property
    def due(self) -> bool:
        """Whether the last safe point is long ago."""
        return time.monotonic() - self._last >= self._interval

    def open_assignment(self, count: int, batch: int, clusters: int) -> Assignment:
        """The clusters (of `clusters`) of `count` keys, as far as they are known in whole batches."""
        return Assignment(self.assignment_path, count, batch, clusters)

    def clear(self) -> None:
        """Removes the files, once the results are in place."""
        for path in (self.path, self.assignment_path):
            if path is not None and os.path.exists(path):
                os.unlink(path)


class Assignment:
    """The cluster of each key in order, appended batch by batch; on disk when there is a path."""

    def __init__(self, path: str | None, count: int, batch: int, clusters: int) -> None:
        self.path, self.count, self.done = path, count, 0
        self._parts: list[NDArray[np.int32]] = []
        self._synced = time.monotonic()
        if path is not None:
            known = np.fromfile(path, np.int32, count) if os.path.exists(path) else np.zeros(0, np.int32)
            self.done = count if len(known) == count else len(known) // batch * batch
            if known.min(initial=0) < 0 or known.max(initial=0) >= clusters:
                self.done = 0  # what a machine that lost power may have left
            self._stream = open(path, "r+b" if self.done else "wb")  # noqa: SIM115  (closed in result)
            self._stream.truncate(self.done * 4)
            self._stream.seek(0, os.SEEK_END)

    def append(self, clusters: NDArray[Any]) -> None:
        """Adds the clusters of the next keys."""
        part = np.ascontiguousarray(clusters, np.int32)
        self.done += len(part)
        if self.path is None:
            self._parts.append(part)
            return
        with writing(self.path):
            self._stream.write(part.data)
            if time.monotonic() - self._synced > SAFE_POINT_SECONDS:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def result(self) -> NDArray[np.int32]:
        """(count,) int32, when all are there."""
        assert self.done == self.count
        if self.path is None:
            return np.concatenate([*self._parts, np.zeros(0, np.int32)])
        with writing(self.path):
            self._stream.close()
        return np.fromfile(self.path, np.int32)
