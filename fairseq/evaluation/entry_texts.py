"""Where in a text the entries of a datastore come from: the tokens before an entry, and the document and the place in
it, where the sidecars of datastore and text say so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.data.document_writer import COLUMNS, documents_path, names_path
from fairseq.data.mmap_dataset import MMapIndexedDataset
from fairseq.evaluation.datastore_pass import stored_rows
from fairseq.files.array_stream import open_array
from fairseq.files.fingerprint import split_fingerprints
from fairseq.files.inputs import open_input
from fairseq.files.sidecar import peek_sidecar

CONTEXT = 20  # tokens before an entry that are shown
ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


class StoredDocuments:
    """The documents of a binarised split from which a datastore was saved.

    split: its path without extension; first_entry: the place in it of the datastore's entry 0, in tokens."""

    def __init__(self, split: str, first_entry: int) -> None:
        self.split, self.first_entry = split, first_entry
        self.tokens = MMapIndexedDataset(split).tokens
        shape = (len(MMapIndexedDataset(split)), len(COLUMNS))
        self.starts = np.asarray(open_array(documents_path(split), ("<i8",), shape)[:, 0])
        self.names: list[str] = []
        if os.path.isfile(names_path(split)):
            with open_input(names_path(split)) as stream:
                lines = stream.read().decode("utf-8", "replace").removesuffix("\n").split("\n")
            self.names = [re.sub(r"\\.", lambda match: ESCAPES.get(match[0], match[0]), line) for line in lines]

    @classmethod
    def of_datastore(cls, prefix: str, data: str, vocabulary: int) -> StoredDocuments | None:
        """Those of the datastore `prefix`, if it is certain that its entries are the tokens of a split of the folder
        `data` one after the other: its sidecar says so, and the split's files are the same still."""
        info = peek_sidecar(prefix)
        split, content = info.get("split"), info.get("content")
        in_order = info.get("sample_break_mode") == "none" and "max_length" not in info
        if not isinstance(split, str) or not in_order or not set(content or {}) <= {"keys", "values"}:
            return None
        path = os.path.join(data, split)
        window, size = info.get("context_window"), info.get("tokens_per_sample")
        if not os.path.isfile(documents_path(path)) or not isinstance(window, int) or not isinstance(size, int):
            return None
        if info.get("data") != split_fingerprints(data, split) or info.get("vocabulary") != vocabulary:
            return None
        count = len(MMapIndexedDataset(path).tokens)
        lengths = np.diff(np.arange(0, count + size, size).clip(max=count))
        available = int(stored_rows(lengths, window, size).sum())
        rows = info.get("rows")
        if not isinstance(rows, int) or info.get("filled_rows") != rows or rows > available:  # zeros, in no document
            return None
        return cls(path, count - available)

    def of_entry(self, entry: int, tokens: NDArray[np.integer]) -> dict[str, Any]:
        """The document and the place in it, in tokens; nothing where the split has other tokens there than these, the
        entry's value and what is before it."""
        place = self.first_entry + entry
        if not np.array_equal(self.tokens[max(0, place + 1 - len(tokens)) : place + 1], tokens):
            return {}
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        name = self.names[number] if number < len(self.names) else ""
        known = {"document": number, "document_position": place - int(self.starts[number])}
        return {**known, "document_name": name} if name else known


class EntryTexts:
    """What is shown of an entry. values: (N,) of the datastore, in the order of its text, or None where they are not
    in such an order; decode: token ids as text."""

    def __init__(
        self,
        values: NDArray[np.integer] | None,
        decode: Callable[[Sequence[int]], str],
        documents: StoredDocuments | None = None,
    ) -> None:
        self.values, self.decode, self.documents = values, decode, documents

    def of_entry(self, entry: int) -> dict[str, Any]:
        """`context`, the text before an entry, and its document, as far as they are known."""
        if self.values is None:
            return {}
        tokens = np.asarray(self.values[max(0, entry - CONTEXT) : entry + 1], np.int64)
        known: dict[str, Any] = {"context": self.decode(tokens[:-1].tolist())}
        return known if self.documents is None else {**known, **self.documents.of_entry(entry, tokens)}
