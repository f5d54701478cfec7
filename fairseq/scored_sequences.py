"""Scored sequences: the triples that cross from the language model to retrieval. A language model is whatever yields
these; retrieval needs nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass
class ScoredSequence:
    """One evaluated sample: what the LM was asked, what was right, and how probable it found that.

    queries: (T, D) float32, the key activation before each target; targets: (T,) int64 token ids;
    lm_log_probs: (T,) float32 in nats; sample_id: the sample's number in the dataset."""

    sample_id: int
    queries: Tensor
    targets: Tensor
    lm_log_probs: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def lockstep_groups(sequences: Iterable[ScoredSequence], tokens: int) -> Iterator[list[ScoredSequence]]:
    """Consecutive sequences in groups of at most `tokens` tokens (or one longer sequence): what advances together."""
    group: list[ScoredSequence] = []
    waiting = 0
    for sequence in sequences:
        if group and waiting + len(sequence) > tokens:
            yield group
            group, waiting = [], 0
        group.append(sequence)
        waiting += len(sequence)
    if group:
        yield group
