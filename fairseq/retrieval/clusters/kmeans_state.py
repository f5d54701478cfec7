"""The state of k-means on disk, from which a run continues after a kill: its arrays in one file with a digest, which is
replaced as a whole, and the clusters of keys in a second file, to which batches with a digest each are appended. A
later run with the same recipe and datastore continues from both, as far as their digests are right, and ends with the
same bytes as a run without interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile
from fairseq.files.array_files import read_digested, same_identity, write_digested
from fairseq.files.atomic_io import discard, leftovers, open_temporary, take_over_temporary, temporary_path, writing
from fairseq.files.inputs import open_input

logger = logging.getLogger(__name__)

SAFE_POINT_SECONDS = 30.0
DIGEST_BYTES = 16
MOST_OF_THE_TIME = 10  # saving may take at most a tenth of the time between two savings


class KMeansState:
    """Arrays by name, as last given to `update`. Without a prefix nothing is written to disk.

    Files: `PREFIX.kmeans.tmp` (an archive with a digest), and the temporary file of `PREFIX.assignment` (int32, one per
    key, and a digest after each batch). The caller must have the lock of `PREFIX`."""

    def __init__(self, prefix: str | None = None, identity: dict[str, Any] | None = None) -> None:
        self.path = None if prefix is None else prefix + ".kmeans.tmp"
        self.assignment_path = None if prefix is None else prefix + ".assignment"
        self.identity = identity or {}
        self.arrays: dict[str, NDArray[Any]] = self._read()
        if not self.arrays:
            self.clear()  # of another recipe's run
        self._interval = SAFE_POINT_SECONDS
        self._last = time.monotonic()

    def _read(self) -> dict[str, NDArray[Any]]:
        """The arrays of an earlier run with the same identity; empty when there are none, or they cannot be read."""
        if self.path is None or not os.path.exists(self.path):
            return {}
        try:
            identity, arrays = read_digested(self.path)
        except BadFile as error:
            logger.warning("%s; clustering from the beginning", error)
            return {}
        if not same_identity(identity, self.identity):
            said = "%s: an unfinished run of another recipe or datastore; clustering from the beginning"
            logger.warning(said, self.path)
            return {}
        return arrays

    def update(self, final: bool = False, **arrays: Any) -> None:
        """Replaces all arrays by `arrays`; writes them when enough time has passed since the last write, or if
        `final`."""
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if self.path is None or not (final or self.due):
            return
        now = time.monotonic()
        write_digested(self.path, self.identity, self.arrays)
        self._last = time.monotonic()
        self._interval = max(SAFE_POINT_SECONDS, MOST_OF_THE_TIME * (self._last - now))

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last write."""
        return time.monotonic() - self._last >= self._interval

    def open_assignment(self, count: int, batch: int, clusters: int) -> Assignment:
        """The assignment of `count` keys to `clusters` clusters, continued after the complete batches of an earlier
        run."""
        of = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=32)
        of.update(np.ascontiguousarray(self.arrays.get("centroids", np.zeros(0, np.float32))).reshape(-1).data)
        return Assignment(self.assignment_path, count, batch, clusters, of.digest())

    def clear(self) -> None:
        """Removes the files; called when the results have been written."""
        if self.path is not None and self.assignment_path is not None:
            assignment = [temporary_path(self.assignment_path), *leftovers(self.assignment_path)]
            discard([Path(self.path), *leftovers(self.path), *assignment])


class Assignment:
    """The cluster of each key in order, appended batch by batch; on disk when there is a path. key: identifies the
    centroids; it is part of the digests, so that an assignment to other centroids is not continued."""

    def __init__(self, path: str | None, count: int, batch: int, clusters: int, key: bytes = b"") -> None:
        self.path, self.count, self.done, self._key = path, count, 0, key
        self._clusters = np.empty(count, np.int32)
        self._synced = time.monotonic()
        if path is not None:
            whole = self._take_over(batch, clusters) if take_over_temporary(path) else 0
            with writing(path):
                self._stream = open_temporary(path, "r+b" if whole else "wb")
                self._stream.truncate(whole)
                self._stream.seek(0, os.SEEK_END)

    def _take_over(self, batch: int, clusters: int) -> int:
        """Reads the complete batches at the start of the file, and returns their size in bytes."""
        assert self.path is not None
        whole = 0
        with open_input(temporary_path(self.path)) as stream:
            while self.done < self.count:
                expected = min(batch, self.count - self.done) * 4 + DIGEST_BYTES
                record = stream.read(expected)
                part = np.frombuffer(record[:-DIGEST_BYTES], np.int32) if len(record) == expected else None
                if part is None or record[-DIGEST_BYTES:] != self._digest(part):
                    break  # a batch that was not completely written, or is damaged
                if part.min() < 0 or part.max() >= clusters:
                    break
                self._take(part)
                whole += expected
        return whole

    def _digest(self, part: NDArray[np.int32]) -> bytes:
        place = self.done.to_bytes(8, "little")  # the position is part of the digest, so that batches cannot be swapped
        return hashlib.blake2b(part.data, digest_size=DIGEST_BYTES, key=self._key, salt=place).digest()

    def _take(self, part: NDArray[np.int32]) -> None:
        self._clusters[self.done : self.done + len(part)] = part
        self.done += len(part)

    def append(self, clusters: NDArray[Any]) -> None:
        """Appends the clusters of the next keys."""
        part = np.ascontiguousarray(clusters, np.int32)
        digest = self._digest(part)
        self._take(part)
        if self.path is None:
            return
        with writing(self.path):
            self._stream.write(part.data)
            self._stream.write(digest)
            if time.monotonic() - self._synced > SAFE_POINT_SECONDS:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()

    def result(self) -> NDArray[np.int32]:
        """(count,) int32; to be called when all clusters have been appended."""
        assert self.done == self.count
        if self.path is not None:
            with writing(self.path):
                self._stream.close()
        return self._clusters
