"""Scored sequences: the triples (query, target, log p_LM) that a language model passes to retrieval. Retrieval needs
nothing else of a language model, so that any model can be used that yields these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Features that a strategy may request of the LM besides the triples: its largest probability and its entropy (nats),
# (T,) float32 each, which require a full softmax, and the CONTEXT_TOKENS tokens before each target, nearest first, (T,
# 4) int64.
FEATURES = ("lm_max", "lm_entropy", "context")
CONTEXT_TOKENS = 4


@dataclass
class ScoredSequence:
    """One evaluated sample.

    queries: (T, D) float32, the key activation before each target; targets: (T,) int64 token ids; lm_log_probs: (T,)
    float32, the LM's log-probabilities of the targets in nats; sample_id: the sample's number in the dataset; features:
    the requested ones of FEATURES, by name; preceding: the token before the first target, -1 where it is unknown."""

    sample_id: int
    queries: Tensor
    targets: Tensor
    lm_log_probs: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    preceding: int = -1

    def __len__(self) -> int:
        return len(self.targets)


def lockstep_groups(sequences: Iterable[ScoredSequence], tokens: int) -> Iterator[list[ScoredSequence]]:
    """Consecutive sequences in groups of at most `tokens` tokens (or one longer sequence), which are advanced
    together."""
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


def contexts(source: Tensor, eos: int) -> Tensor:
    """(..., T, 4) int64: the four tokens before the target at each position of `source` (..., T), nearest first; `eos`
    before the start of the text. The source is the target shifted by one, so the nearest token is the source at the
    same position."""
    padded = torch.cat([source.new_full((*source.shape[:-1], CONTEXT_TOKENS - 1), eos), source], -1)
    return padded.unfold(-1, CONTEXT_TOKENS, 1).flip(-1).long()
