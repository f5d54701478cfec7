"""Documents to the tokens of a Hugging Face tokenizer, a unit of a file at a time."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.data.document_files import DocumentFile, SafeCut, Unit
from fairseq.data.document_writer import Encoded
from fairseq.files.odd_characters import MARKS, NULS, RETURNS, count_odd_characters

SPACES = re.compile(r"\s+")
SPECIAL = "special tokens"
NAMELESS = "objects whose id is neither text nor a whole number"
ODD = {  # what a warning says of each kind
    SPECIAL: "which the text spells out, or which replace unknown characters",
    NULS: "which become part of tokens",
    MARKS: "which become part of tokens",
    RETURNS: "which end no line here and become part of tokens",
    NAMELESS: "whose documents have no name; --name-field takes another field",
}


def one_thread() -> None:
    """Leaves a worker process one thread of the tokenizers library: the processes share the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class DocumentEncoder:
    """Encodes documents with what the tokenizer itself adds to each, and the token `eos` after it, if one is given.

    source: the file that decodes its units."""

    def __init__(self, tokenizer: Any, eos: int | None, source: DocumentFile) -> None:
        self.tokenizer, self.eos, self.source = tokenizer, eos, source
        self.begin, self.end = added_tokens(tokenizer)
        self._special = np.array(sorted(tokenizer.all_special_ids), np.int64)

    def __call__(self, unit: Unit) -> Encoded:
        """The tokens of a unit's documents, or of a piece of one; BadFile for what cannot be decoded."""
        documents = self.source.documents(unit)
        texts, piece = documents.texts, not (unit.begins and unit.ends)
        ids = self._ids(texts, add=not piece)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        added = 0 if piece else len(texts) * int(np.isin([*self.begin, *self.end], self._special).sum())
        odd = Counter({SPECIAL: int(np.isin(flat, self._special).sum()) - added})
        if piece:
            flat = np.concatenate([self.begin if unit.begins else [], flat, self.end if unit.ends else []])
            flat = flat.astype(np.int64)
            lengths = np.array([len(flat)])
        if self.eos is not None and unit.ends:
            flat = np.insert(flat, np.cumsum(lengths), self.eos)
            lengths = lengths + 1
        table = np.stack([lengths, *self._counts(texts)], axis=1).reshape(-1, 4)
        odd[NAMELESS] = documents.nameless
        count_odd_characters("\n".join(texts).encode(), odd)
        where = (unit.begins, unit.ends, unit.end, unit.next_number)
        return Encoded(flat.astype(np.int32), table, documents.names, *where, +odd)

    def _ids(self, texts: list[str], add: bool) -> list[list[int]]:
        if not texts:
            return []
        settings = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=add, **settings)["input_ids"]
        return ids

    @staticmethod
    def _counts(texts: list[str]) -> list[NDArray[np.int64]]:
        """UTF-8 bytes, words and split words of each text."""
        numbers = (
            [len(text.encode()) for text in texts],
            [len(text.split()) for text in texts],
            [len(SPACES.findall(text)) + 1 for text in texts],
        )
        return [np.array(column, np.int64) for column in numbers]


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after each document."""
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def safe_cut(tokenizer: Any) -> SafeCut | None:
    """Whether a text can be cut between two lines without another token anywhere, for tokenizers that divide text into
    words first, beyond which no token reaches; None for others. It can where the words of a window around the cut end
    there, and the window's tokens are those of its halves."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return None

    def normal(text: str) -> str:
        return str(backend.normalizer.normalize_str(text)) if backend.normalizer is not None else text

    def ids(text: str) -> list[int]:
        found: list[int] = backend.encode(text, add_special_tokens=False).ids
        return found

    def is_safe(before: str, after: str) -> bool:
        left = normal(before)
        if left + normal(after) != normal(before + after) or ids(before) + ids(after) != ids(before + after):
            return False
        words = backend.pre_tokenizer.pre_tokenize_str(normal(before + after))
        return any(end == len(left) for _, (_, end) in words)

    backend.no_truncation()
    backend.no_padding()
    return is_safe
