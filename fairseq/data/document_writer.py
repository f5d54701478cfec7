"""Writes tokenised documents as a binarised split, resumably: `.bin`, `.idx`, and `.documents.npy` and `.names.txt`
with what `.idx` does not say of each document. Rows go to temporary files; a progress file records where in the source
the rows come from that have been flushed to disk, and a later run with the same `identity` continues there."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.data.indexed_dataset import best_fitting_dtype
from fairseq.data.mmap_dataset import data_file_path, index_file_path, write_index
from fairseq.errors import BadFile
from fairseq.files.array_stream import ArrayStream, open_array
from fairseq.files.atomic_io import atomic_write, delay_interrupts, discard
from fairseq.files.progress import read_progress, warn_of_other_run, write_progress
from fairseq.files.sidecar import remove_sidecar

logger = logging.getLogger(__name__)

SAFE_POINT_SECONDS = 30.0
LONGEST = np.iinfo(np.int32).max  # tokens of a document, as `.idx` has int32 lengths
COLUMNS = ("first_token", "bytes", "words", "split_words")  # of .documents.npy


@dataclass
class Encoded:
    """Documents as tokens. tokens: (n,) of all; table: (documents, 4) int64: tokens, UTF-8 bytes, words, split words of
    each; begins, ends: as of a `Unit`; end, number: where in the source they end."""

    tokens: NDArray[Any]
    table: NDArray[np.int64]
    names: list[str] | None
    begins: bool
    ends: bool
    end: int
    number: int
    odd: dict[str, int] = field(default_factory=dict)


def documents_path(prefix: str) -> str:
    """The file of what is known of each document of the split at `prefix`."""
    return prefix + ".documents.npy"


def names_path(prefix: str) -> str:
    """The file of the documents' names."""
    return prefix + ".names.txt"


def escaped(name: str) -> str:
    """A name in one line: a backslash, line feed and carriage return are written as two characters."""
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


class DocumentWriter:
    """Appends `Encoded` documents to the split at `prefix`. position, number: where in the source to go on; counts,
    odd: of what was appended so far.

    vocabulary: number of token ids, which decides the type of numbers; identity: plain values that tell this job from
    others; named: whether the documents may have names."""

    def __init__(self, prefix: str, vocabulary: int, identity: dict[str, Any], named: bool) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(best_fitting_dtype(vocabulary)).newbyteorder("<")
        self.identity = identity
        self._paths = [data_file_path(prefix), documents_path(prefix), *([names_path(prefix)] if named else [])]
        self._progress = prefix + ".progress.json"
        self.position = self.number = 0
        self.counts = dict.fromkeys(("documents", "tokens", "bytes", "words", "split_words", "named"), 0)
        self.odd: Counter[str] = Counter()
        self._open: list[int] | None = None  # the counts of a document of which parts were appended
        self._resume()
        self._last_safe_point = time.monotonic()

    def _resume(self) -> None:
        noted = read_progress(self._progress)
        if noted.get("identity") != self.identity:
            warn_of_other_run(self._progress, noted)
        else:
            try:
                self._streams = self._opened(noted["rows"], noted["digests"])
                self.position, self.number, self.counts = noted["position"], noted["number"], noted["counts"]
                self.odd, self._open = Counter(noted["odd"]), noted["open"]
                logger.info("%s: going on after %d documents", self.prefix, self.counts["documents"])
                return
            except (BadFile, KeyError) as error:  # its files are gone, or differ
                logger.warning("%s: an earlier run cannot be continued (%s)", self.prefix, error)
        self._streams = self._opened([0] * len(self._paths), [""] * len(self._paths))

    def _opened(self, rows: list[int], digests: list[str]) -> list[ArrayStream]:
        kinds: list[tuple[Any, tuple[int, ...], bool]]
        kinds = [(self.dtype, (), True), ("<i8", (len(COLUMNS),), False), (np.uint8, (), True)]
        streams: list[ArrayStream] = []
        try:
            for path, count, digest, (dtype, shape, raw) in zip(self._paths, rows, digests, kinds):
                streams.append(ArrayStream(path, dtype, shape, count, digest, raw))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def append(self, encoded: Encoded) -> None:
        """Appends some documents, or a part of one."""
        table = self._whole_documents(encoded)
        lengths = table[:, 0]
        if len(lengths) and lengths.max() > LONGEST:
            found, expected = f"a document of {lengths.max()} tokens", f"at most {LONGEST} in each"
            raise BadFile(self.prefix, found, expected, "divide it, for example with --document-separator")
        self._streams[0].append(encoded.tokens)
        first = self.counts["tokens"] + np.cumsum(lengths) - lengths
        self._streams[1].append(np.concatenate([first[:, None], table[:, 1:]], axis=1))
        if len(self._streams) > 2:
            names = [""] * len(table) if encoded.names is None else encoded.names
            lines = "".join(escaped(name) + "\n" for name in names).encode()
            self._streams[2].append(np.frombuffer(lines, np.uint8))
            self.counts["named"] += sum(map(bool, names))
        totals = [len(table), *table.sum(0).tolist()]
        for name, total in zip(("documents", "tokens", *COLUMNS[1:]), totals):
            self.counts[name] += total
        self.odd.update(encoded.odd)
        self.position, self.number = encoded.end, encoded.number
        if time.monotonic() - self._last_safe_point > SAFE_POINT_SECONDS:
            self.safe_point()

    def _whole_documents(self, encoded: Encoded) -> NDArray[np.int64]:
        """The table's rows of documents that are complete now."""
        if encoded.begins and encoded.ends:
            return encoded.table
        total = encoded.table[0].copy()
        if self._open is not None:
            total += np.array(self._open)
            total[3] -= 1  # pieces are cut beside white space, and n runs of it make n + 1 words of a split
        self._open = None if encoded.ends else total.tolist()
        return total[None] if encoded.ends else encoded.table[:0]

    def safe_point(self) -> None:
        """Flushes all rows to disk and records them, so that they survive a kill."""
        for stream in self._streams:
            stream.flush()
        rows, digests = [s.rows for s in self._streams], [s.digest for s in self._streams]
        state = {"position": self.position, "number": self.number, "counts": self.counts}
        state |= {"odd": dict(self.odd), "open": self._open}
        write_progress(self._progress, {"identity": self.identity, "rows": rows, "digests": digests, **state})
        self._last_safe_point = time.monotonic()

    def close(self) -> None:
        """Leaves unfinished files for a later run, or nothing where nothing was appended."""
        if self._streams[0].finished:
            return
        if not self.position:
            return self.abandon()
        try:
            self.safe_point()
        finally:
            for stream in self._streams:
                stream.close()

    def abandon(self) -> None:
        """Gives up: all that is unfinished is removed."""
        for stream in self._streams:
            stream.abandon()
        discard([Path(self._progress)])

    def finish(self) -> None:
        """Renames the files and writes `.idx`; the split's sidecar, which says what they are, is the caller's."""
        index = index_file_path(self.prefix)
        tokens, documents, *names = self._streams
        with delay_interrupts():
            remove_sidecar(self.prefix)
            discard([Path(index), Path(names_path(self.prefix))])
            documents.finish()
            for stream in names:
                stream.finish() if self.counts["named"] else stream.abandon()
            tokens.finish()
            first = open_array(documents_path(self.prefix), ("<i8",), (documents.rows, len(COLUMNS)))[:, 0]
            with atomic_write(index) as output:
                write_index(output, np.diff(first, append=self.counts["tokens"]), self.dtype)

    def done(self) -> None:
        """To be called when the sidecar is written: the progress is forgotten."""
        discard([Path(self._progress)])
