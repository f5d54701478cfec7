"""Retrieval strategies: who votes, when to search, how much to trust the votes.

A strategy is a small class: `propose` says, for the sequences of a step, which need a search and which entries are
candidates for free; `observe` learns which candidates had the right value. `@register_retriever("name")` makes it
available as `--strategy name`; `add_args` declares its own flags. See docs/extending.md for one in forty lines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq.registry import class_registrar
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.entries import Entries

RETRIEVER_REGISTRY: dict[str, type[Retriever]] = {}


@dataclass
class Resources:
    """What a strategy may use: the datastore's size, the clusters (or None), the device and the constant lambda."""

    size: int
    k: int
    lmbda: float
    clusters: Clusters | None = None
    device: torch.device | str = "cpu"


@dataclass
class Step:
    """One token of each of B sequences, or (for strategies that are not sequential) any B tokens.

    sample_ids, positions: (B,) int64, which token of which sample; queries: (B, D) float32; lm_log_probs: (B,) float32,
    the LM's log-probability of the target in nats; features: what the strategy `needs`, rows as above."""

    sample_ids: Tensor
    positions: Tensor
    queries: Tensor
    lm_log_probs: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class Proposal:
    """search: (B,) bool, which tokens need a search; entries: further candidates (or None); lmbda: (B,) float32, the
    weight of the retrieval distribution for each token, or None for the constant one."""

    search: Tensor
    entries: Entries | None = None
    lmbda: Tensor | None = None


class Retriever:
    """Base of all strategies. What a strategy says about itself:

    sequential: False when a token's retrieval does not depend on earlier tokens' (nor on --min-knns and --members);
    only_mixes: True when --lmbda changes the mixture alone, neither who votes nor who is searched, so that a sweep may
    try another lambda without another walk over the tokens;
    meets_target: True when the strategy reads --target-foss itself; for others --min-knns is chosen;
    needs: which of `scored_sequences.FEATURES` it reads in `step.features`; they cost the LM a full softmax a token."""

    needs: frozenset[str] = frozenset()
    sequential = True
    only_mixes = False
    meets_target = False

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        self.args, self.resources = args, resources

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the strategy's own flags."""

    @staticmethod
    def check_asked_by(args: argparse.Namespace, asking: Mapping[str, Any], places: Sequence[str]) -> None:
        """Refuses files of the strategy's own that were made for another model than the one `asking`, described as in a
        datastore's sidecar; `places`: see `belonging.check_asked_by`."""

    def twin(self) -> Retriever:
        """Another like this one, with a state of its own, for sequences that advance in another thread."""
        return type(self)(self.args, self.resources)

    def start(self) -> None:
        """Called when a new group of sequences begins."""

    def propose(self, step: Step) -> Proposal:
        """Decides about the tokens of `step`, before their values are known. Sequence i of a step is sequence i of the
        previous step; sequences that have ended are missing at the end."""
        raise TypeError(f"{type(self).__name__} must define propose")

    def observe(self, step: Step, matched: Entries) -> None:
        """Receives the candidates, searched or proposed, whose value was the token that came."""


register_retriever = class_registrar("--strategy", RETRIEVER_REGISTRY, Retriever)

from fairseq.retrieval.retrievers import (  # noqa: E402, F401  (they fill the registry)
    adaptret,
    chains,
    chains_adaptret,
    knnlm,
    random_skip,
    retomaton,
)
