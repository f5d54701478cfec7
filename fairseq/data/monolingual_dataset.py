"""Language-model samples: takes (source, future, past) blocks, chooses the targets, adds begin-of-sentence on request,
and pads samples into batches. Key names and quirks follow fairseq 0.9."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairseq.data import data_utils
from fairseq.data.dictionary import Dictionary
from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.errors import UserError

TARGETS = ("self", "future", "past")


def collate(samples: list[dict[str, Any]], pad_idx: int, eos_idx: int) -> dict[str, Any]:
    """A batch: ids, `net_input` with (B, L) int64 `src_tokens` and (B,) `src_lengths`, and right-padded targets.

    `ntokens` counts source tokens. No samples give an empty dictionary, the dummy batch of an uneven shard."""
    if not samples:
        return {}

    def merge(values: list[Any]) -> torch.Tensor:
        return data_utils.collate_tokens(values, pad_idx, eos_idx, left_pad=False)

    targets = [s["target"] for s in samples]
    target: Any = [merge(list(column)) for column in zip(*targets)] if isinstance(targets[0], list) else merge(targets)
    return {
        "id": torch.tensor([s["id"] for s in samples], dtype=torch.long),
        "nsentences": len(samples),
        "ntokens": sum(len(s["source"]) for s in samples),
        "net_input": {
            "src_tokens": merge([s["source"] for s in samples]),
            "src_lengths": torch.tensor([s["source"].numel() for s in samples], dtype=torch.long),
        },
        "target": target,
    }


class MonolingualDataset(SizedDataset):
    """Wraps a TokenBlockDataset with `include_targets`.

    `targets` lists what to predict: `future` (the next word, the default), `self`, `past`; one gives a tensor, several
    a list in the order given. Target ids beyond `tgt_vocab` become unk."""

    def __init__(
        self,
        dataset: Any,
        sizes: np.ndarray | Sequence[int],
        src_vocab: Dictionary,
        tgt_vocab: Dictionary | None = None,
        add_eos_for_other_targets: bool = False,
        shuffle: bool = False,
        targets: list[str] | None = None,
        add_bos_token: bool = False,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.sizes = np.asarray(sizes)
        self.vocab = src_vocab
        self.tgt_vocab = tgt_vocab or src_vocab
        self.add_eos_for_other_targets = add_eos_for_other_targets
        self.shuffle = shuffle
        self.add_bos_token = add_bos_token
        self.targets = targets or ["future"]
        unknown = set(self.targets) - set(TARGETS)
        if unknown:
            raise ValueError(f"targets {sorted(unknown)} are not among {', '.join(TARGETS)}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: id, source (length,), target (the same, or a list of them)."""
        source, target = self._make_source_target(*self.dataset[index])
        if self.add_bos_token:
            source = self._with_bos(source)
            target = [self._with_bos(t) for t in target]
        return {"id": index, "source": source, "target": target if len(target) > 1 else target[0]}

    def _with_bos(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens.new_tensor([self.vocab.bos()]), tokens])

    def _make_source_target(
        self, source: torch.Tensor, future: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        others = "self" in self.targets or "past" in self.targets
        if self.add_eos_for_other_targets and others and int(source[-1]) != self.vocab.eos():
            # The word itself, or the one before it, is predicted at the closing eos as well.
            last = source[-1:]
            source = torch.cat([source, source.new_tensor([self.vocab.eos()])])
            future = torch.cat([future, future.new_tensor([self.vocab.pad()])])
            past = torch.cat([past.new_tensor([self.vocab.pad()]), past[1:], last])
        chosen = {"self": source, "future": future, "past": past}
        return source, [self._within_vocab(chosen[name]) for name in self.targets]

    def _within_vocab(self, target: torch.Tensor) -> torch.Tensor:
        if len(self.tgt_vocab) == len(self.vocab):
            return target
        return torch.where(target >= len(self.tgt_vocab), self.tgt_vocab.unk(), target)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `collate`. UserError for tokens that the dictionary does not have."""
        batch = collate(samples, self.vocab.pad(), self.vocab.eos())
        if batch:
            tokens = batch["net_input"]["src_tokens"]
            low, high = int(tokens.min()), int(tokens.max())
            if low < min(0, self.vocab.pad()) or high >= len(self.vocab):
                raise UserError(
                    f"the data: found token ids from {low} to {high}, expected 0 to {len(self.vocab) - 1} as the "
                    "dictionary has; use the dict.txt that the text was binarised with, or preprocess it again"
                )
        return batch

    def ordered_indices(self) -> np.ndarray:
        """By ascending length; among equals at random (numpy's generator) with `shuffle`, else by index."""
        ties = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        return np.lexsort((ties, self.sizes))

    @property
    def supports_prefetch(self) -> bool:
        return getattr(self.dataset, "supports_prefetch", False)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prefetches the blocks of the given samples."""
        self.dataset.prefetch(indices)
