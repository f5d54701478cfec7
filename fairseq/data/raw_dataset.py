"""The raw format: a plain text file named exactly like the split, encoded in memory with the dictionary."""

from __future__ import annotations

import functools
import logging
import os

import numpy as np
import torch

from fairseq.data.binarization import Encoder
from fairseq.data.dictionary import Dictionary
from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.files.inputs import regular_size
from fairseq.files.odd_characters import odd_sentences, refuse_other_encodings

logger = logging.getLogger(__name__)


class IndexedRawTextDataset(SizedDataset):
    """One item per text line. `tokens`: all ids, flat int32; `sizes`: (n,) int32 item lengths."""

    def __init__(self, path: str, dictionary: Dictionary, append_eos: bool = True, reverse_order: bool = False) -> None:
        super().__init__()
        regular_size(path)
        refuse_other_encodings(path)
        self.path = path
        self.append_eos, self.reverse_order = append_eos, reverse_order
        tokens, sizes = [], []
        encoder = Encoder(dictionary, append_eos, reverse_order)
        for ids, lengths in encoder.encode_file(path):
            tokens.append(ids)
            sizes.append(lengths)
        for sentence in odd_sentences(encoder.summary.odd):
            logger.warning("%s: found %s", path, sentence)
        self.tokens: np.ndarray = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        self.sizes: np.ndarray = np.concatenate(sizes) if sizes else np.empty(0, np.int32)
        self.contiguous = True
        self._starts = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Item `i` as (size,) int64."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)} in {self.path}")
        return torch.from_numpy(self.tokens[self._starts[i] : self._starts[i + 1]].astype(np.int64))

    def token_range(self, start: int, end: int) -> np.ndarray:
        """Elements [start, end) of the concatenated items."""
        return self.tokens[start:end]

    @functools.cached_property
    def lines(self) -> list[str]:
        """The text lines, read at the first call."""
        with open(self.path, encoding="utf-8") as stream:
            return [line.rstrip("\n") for line in stream]

    def get_original_text(self, i: int) -> str:
        """The text of item `i`."""
        return self.lines[i]

    @staticmethod
    def exists(path: str) -> bool:
        """Whether the text file is there."""
        return os.path.isfile(path)
