"""What k-means keeps on disk so that a killed run goes on: its arrays in one sealed file, replaced as a whole, and the
clusters of keys in a second one that only grows, each batch of it with a digest. A second run with the same recipe and
datastore takes both over, as far as they are what was written, and ends with the bytes that an undisturbed run would
have written."""

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
from fairseq.files.array_files import read_sealed, same_identity, write_sealed
from fairseq.files.atomic_io import adopt, discard, leftovers, open_temporary, temporary_path, writing
from fairseq.files.inputs import open_input

logger = logging.getLogger(__name__)

SAFE_POINT_SECONDS = 30.0
DIGEST_BYTES = 16
MOST_OF_THE_TIME = 10  # a safe point may take a tenth of the time between two of them


class KMeansState:
    """Arrays by name, as `keep` last wrote them. Without a prefix nothing touches the disk.

    Files: `PREFIX.kmeans.tmp` (sealed), the temporary file of `PREFIX.assignment` (int32, one a key, and
    a digest after each batch). The caller holds the lock of `PREFIX`."""

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
        """The arrays of an earlier run of the same identity; none when there are none, or they cannot be read."""
        if self.path is None or not os.path.exists(self.path):
            return {}
        try:
            identity, arrays = read_sealed(self.path)
        except BadFile as error:
            logger.warning("%s; clustering from the beginning", error)
            return {}
        if not same_identity(identity, self.identity):
            logger.warning("%s: an unfinished run of another recipe or datastore; clustering anew", self.path)
            return {}
        return arrays

    def keep(self, final: bool = False, **arrays: Any) -> None:
        """Replaces what is kept by `arrays`; writes it when the last safe point is long ago, or at once if `final`."""
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if self.path is None or not (final or self.due):
            return
        now = time.monotonic()
        write_sealed(self.path, self.identity, self.arrays)
        self._last = time.monotonic()
        self._interval = max(SAFE_POINT_SECONDS, MOST_OF_THE_TIME * (self._last - now))

    @property
    def due(self) -> bool:
        """Whether the last safe point is long ago."""
        return time.monotonic() - self._last >= self._interval

    def open_assignment(self, count: int, batch: int, clusters: int) -> Assignment:
        """The clusters (of `clusters`) of `count` keys, as far as they are known in whole batches."""
        of = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=32)
        of.update(np.ascontiguousarray(self.arrays.get("centroids", np.zeros(0, np.float32))).reshape(-1).data)
        return Assignment(self.assignment_path, count, batch, clusters, of.digest())

    def clear(self) -> None:
        """Removes the files, once the results are in place."""
        if self.path is not None and self.assignment_path is not None:
            assignment = [temporary_path(self.assignment_path), *leftovers(self.assignment_path)]
            discard([Path(self.path), *leftovers(self.path), *assignment])


class Assignment:
    """The cluster of each key in order, appended batch by batch; on disk when there is a path. `key` says of which
    centroids, so that the clusters of others are not taken over."""

    def __init__(self, path: str | None, count: int, batch: int, clusters: int, key: bytes = b"") -> None:
        self.path, self.count, self.done, self._key = path, count, 0, key
        self._clusters = np.empty(count, np.int32)
        self._synced = time.monotonic()
        if path is not None:
            whole = self._take_over(batch, clusters) if adopt(path) else 0
            self._stream = open_temporary(path, "r+b" if whole else "wb")
            self._stream.truncate(whole)
            self._stream.seek(0, os.SEEK_END)

    def _take_over(self, batch: int, clusters: int) -> int:
        """Bytes of the whole batches at the start of the file, which are taken over."""
        assert self.path is not None
        whole = 0
        with open_input(temporary_path(self.path)) as stream:
            while self.done < self.count:
                expected = min(batch, self.count - self.done) * 4 + DIGEST_BYTES
                record = stream.read(expected)
                part = np.frombuffer(record[:-DIGEST_BYTES], np.int32) if len(record) == expected else None
                if part is None or record[-DIGEST_BYTES:] != self._digest(part):
                    break  # what a machine that lost power, or damage, has left
                if part.min() < 0 or part.max() >= clusters:
                    break
                self._take(part)
                whole += expected
        return whole

    def _digest(self, part: NDArray[np.int32]) -> bytes:
        place = self.done.to_bytes(8, "little")  # so that one batch cannot stand for another
        return hashlib.blake2b(part.data, digest_size=DIGEST_BYTES, key=self._key, salt=place).digest()

    def _take(self, part: NDArray[np.int32]) -> None:
        self._clusters[self.done : self.done + len(part)] = part
        self.done += len(part)

    def append(self, clusters: NDArray[Any]) -> None:
        """Adds the clusters of the next keys."""
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
        """(count,) int32, when all are there."""
        assert self.done == self.count
        if self.path is not None:
            with writing(self.path):
                self._stream.close()
        return self._clusters
