"""Evaluation with left context: every row of a batch is preceded by the last tokens of the row before it, which are
read but not scored again. The context is a running state: it crosses rows, batches, lines and documents, so batches
must come one after the other, in the order of the data, through one collater."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import BaseWrapperDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.errors import BadFlag


class LMContextWindowDataset(BaseWrapperDataset):
    """Prepends up to `context_window` preceding tokens to each row of a MonolingualDataset's batches.

    `tokens_per_sample` is the block length without context. A batch gains `start_indices`: the column of each row's
    first own token; `ntokens` and the sizes used for batching do not count the context."""

    def __init__(self, dataset: MonolingualDataset, tokens_per_sample: int, context_window: int, pad_idx: int) -> None:
        if context_window <= 0:
            raise BadFlag("--context-window", context_window, "a positive number of tokens")
        super().__init__(dataset)
        self.tokens_per_sample = tokens_per_sample
        self.context_window = context_window
        self.pad_idx = pad_idx
        self.prev_tokens = np.empty(0, dtype=np.int64)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The wrapped dataset's batch, (B, W), widened to (B, W + context_window)."""
        sample = self.dataset.collater(samples)
        if not sample:
            return sample
        rows, targets = sample["net_input"]["src_tokens"].numpy(), sample["target"].numpy()
        batch, width = rows.shape
        tokens = np.full((batch, width + self.context_window), self.pad_idx, dtype=np.int64)
        shifted = np.full_like(tokens, self.pad_idx)
        starts = []
        for i, row in enumerate(rows):
            own = int(np.count_nonzero(row != self.pad_idx))
            extra = len(self.prev_tokens) + own - (self.tokens_per_sample + self.context_window)
            if extra > 0:  # a block longer than tokens_per_sample leaves fewer positions for context
                self.prev_tokens = self.prev_tokens[extra:]
            start = len(self.prev_tokens)
            tokens[i, :start] = self.prev_tokens
            tokens[i, start : start + width] = row
            shifted[i, start : start + width] = targets[i]
            starts.append(start)
            self.prev_tokens = tokens[i][tokens[i] != self.pad_idx][-self.context_window :]
        sample["net_input"]["src_tokens"] = torch.from_numpy(tokens)
        sample["net_input"]["src_lengths"] = sample["net_input"]["src_lengths"] + torch.tensor(starts)
        sample["target"] = torch.from_numpy(shifted)
        sample["start_indices"] = starts
        return sample

    def ordered_indices(self) -> np.ndarray:
        """The order of the data, without sorting by length, because the context of a row is the row before it."""
        return np.arange(len(self.dataset))

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.dataset.num_tokens_vec(indices)
