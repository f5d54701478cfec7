"""Scored sequences: the triples that cross from the language model to retrieval. A language model is whatever yields
these; retrieval needs nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

# What a strategy may ask of the LM beyond the triples: its largest probability and its entropy (nats), (T,) float32
# each, and the CONTEXT_TOKENS tokens before each target, nearest first, (T, 4) int64. They cost a full softmax.
FEATURES = ("lm_max", "lm_entropy", "context")
CONTEXT_TOKENS = 4


@dataclass
class ScoredSequence:
    """One evaluated sample: what the LM was asked, what was right, and how probable it found that.

    queries: (T, D) float32, the key activation before each target; targets: (T,) int64 token ids;
    lm_log_probs: (T,) float32 in nats; sample_id: the sample's number in the dataset; features: those of FEATURES that
    were asked for, by name; preceding: the token before the first target, -1 where nobody knows it."""

    sample_id: int
    queries: Tensor
    targets: Tensor
    lm_log_probs: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    preceding: int = -1

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
