"""The interface of retrieval strategies, which decide which entries vote, when to search, and the weight of the votes.

A strategy is a small class with up to four methods, called for one token of many sequences at a time:

    propose   which tokens need a search, and which entries are candidates without one
    weigh     lambda, and the weight of each candidate's vote, before the right token is known
    observe   which candidates had the right value
    take_rows only where text is generated: which sequences go on, and in which order

`@register_retriever("name")` makes it available as `--strategy name`; `add_args` declares its own flags. See
docs/extending.md for complete ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import BadFlag, UserError
from fairseq.registry import class_registrar
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.similarity import Similarity
from fairseq.retrieval.voting import Searched

RETRIEVER_REGISTRY: dict[str, type[Retriever]] = {}


@dataclass
class Resources:
    """What a strategy may use. size: number of entries of the datastore; k: neighbours that a search returns; lmbda:
    the constant lambda; clusters; device; temperature of the softmax over candidates; similarity: scores entries."""

    size: int
    k: int
    lmbda: float
    clusters: Clusters | None = None
    device: torch.device | str = "cpu"
    temperature: float = 1.0
    similarity: Similarity | None = None


@dataclass
class Step:
    """One token of each of B sequences, or (for strategies that are not sequential) any B tokens.

    sample_ids, positions: (B,) int64, which token of which sample; queries: (B, D) float32; features: name -> (B, ...),
    those that the strategy `needs`. Nothing here depends on the tokens that are to be predicted."""

    sample_ids: Tensor
    positions: Tensor
    queries: Tensor
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


@dataclass
class Candidates:
    """All candidates of a step with B tokens, before the right tokens are known, as flat arrays: first those that
    searches found (`found` of them), then those that the strategy proposed.

    rows (C,) int64: the token of the step that each one is a candidate for; ids (C,) int64 datastore entries, -1 where
    a search found fewer than k; scores (C,) float32, larger is nearer (minus the squared L2 distance, unless
    `--knn-sim-func` says otherwise); values (C,) int64: the token that followed each entry; weights (C,) float32: the
    weight of each vote; temperature: of the softmax over scores."""

    tokens: int
    found: int
    rows: Tensor
    ids: Tensor
    scores: Tensor
    values: Tensor
    weights: Tensor
    temperature: float

    @classmethod
    def of(cls, tokens: int, searched: Searched, given: Entries, values: Tensor, temperature: float) -> Candidates:
        """The candidates found by searches and those given by the strategy; values (N,): all values of the
        datastore."""
        assert given.scores is not None
        k = searched.ids.shape[1]
        rows = torch.cat([searched.rows.repeat_interleave(k), given.rows])
        ids = torch.cat([searched.ids.flatten(), given.ids])
        scores = torch.cat([searched.scores.flatten(), given.scores])
        found_weights = scores.new_ones(searched.ids.numel())
        given_weights = scores.new_ones(len(given)) if given.weights is None else given.weights
        weights = torch.cat([found_weights, given_weights])
        return cls(tokens, len(found_weights), rows, ids, scores, values[ids].long(), weights, temperature)

    def largest(self, numbers: Tensor) -> Tensor:
        """(B,): each token's largest of `numbers` (C,), minus infinity for a token without candidates."""
        none = numbers.new_full((self.tokens,), -math.inf)
        return none.scatter_reduce_(0, self.rows, numbers, "amax")

    def sums(self, numbers: Tensor) -> Tensor:
        """(B,): each token's sum of `numbers` (C,)."""
        return numbers.new_zeros(self.tokens).index_add_(0, self.rows, numbers)

    def shares(self) -> Tensor:
        """(C,): each candidate's part of its token's p_kNN, so that those of a token sum to one."""
        peak = self.largest(self.scores)
        below = (self.scores - torch.where(peak.isinf(), 0.0, peak)[self.rows]) / self.temperature
        mass = self.weights * below.exp()
        return mass / self.sums(mass).clamp(min=torch.finfo(mass.dtype).tiny)[self.rows]

    def distribution(self) -> tuple[Tensor, Tensor, Tensor]:
        """p_kNN of every token where it is not zero: rows (n,), values (n,) and probabilities (n,), in ascending order
        of row and value. No array is as wide as the vocabulary."""
        width = int(self.values.max()) + 1 if len(self.values) else 1
        pairs, place = torch.unique(self.rows * width + self.values, return_inverse=True)
        probabilities = self.scores.new_zeros(len(pairs)).index_add_(0, place, self.shares())
        return pairs // width, pairs % width, probabilities

    def top_probability(self) -> Tensor:
        """(B,): the largest probability that p_kNN gives to a single token of the vocabulary; 0 without candidates."""
        rows, _, probabilities = self.distribution()
        return probabilities.new_zeros(self.tokens).scatter_reduce_(0, rows, probabilities, "amax")


@dataclass
class Weights:
    """What `weigh` may return. lmbda: (B,) float32 from 0 to 1, replaces the proposal's; votes: (C,) float32, not
    negative, the weight of each candidate's vote in the order of `Candidates`, replaces their `weights`."""

    lmbda: Tensor | None = None
    votes: Tensor | None = None


class Retriever:
    """Base of all strategies. Class attributes:

    sequential: False when a token's retrieval does not depend on earlier tokens' (nor on --min-knns and --members);
    only_mixes: True when --lmbda changes only the mixture with the LM, neither the candidates nor the searches, so that
    a sweep may try another lambda without evaluating again; meets_target: True when the strategy reads --target-foss
    itself; for other strategies --min-knns is chosen; saving_flags: the flags that decide how many searches are saved;
    a figure joins the values of one of them by a curve; needs: the `scored_sequences.FEATURES` that it reads in
    `step.features`; for `lm_max` and `lm_entropy` the LM has to compute a full softmax per token."""

    needs: frozenset[str] = frozenset()
    sequential = True
    only_mixes = False
    meets_target = False
    saving_flags: tuple[str, ...] = ("min_knns", "target_foss")

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        self.args, self.resources = args, resources

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the strategy's own flags."""

    @staticmethod
    def check_query_model(args: argparse.Namespace, query_model: Mapping[str, Any], places: Sequence[str]) -> None:
        """Refuses files of the strategy, if it has any, that were made for another model than that of the queries.
        query_model, places: see `datastore.provenance.check_query_model`."""

    def twin(self) -> Retriever:
        """Another object of the same class and settings, with a state of its own, for the sequences of another
        thread."""
        return type(self)(self.args, self.resources)

    def start(self) -> None:
        """Called when a new group of sequences begins."""

    def propose(self, step: Step) -> Proposal:
        """Decides about the tokens of `step`, before anything is searched. Sequence i of a step is sequence i of the
        previous step; sequences that have ended are missing at the end."""
        raise UserError(f"{type(self).__name__}: found no method propose, expected one in each strategy; define it")

    def weigh(self, step: Step, candidates: Candidates) -> Weights | None:
        """Decides, once the candidates are known and before the right tokens are, about lambda and the weights of the
        candidates' votes. None leaves both unchanged. Called only for classes that define it."""
        return None

    def observe(self, step: Step, matched: Entries) -> None:
        """Receives the candidates, found by a search or proposed, whose value was the right token."""

    def take_rows(self, rows: Tensor) -> None:
        """Rearranges what is remembered of the sequences, before `propose` or before `observe`: sequence i goes on from
        what was sequence rows[i] (B,) int64, which several may do; -1 begins a new one.

        Generation calls it, when hypotheses are chosen, end or begin. A strategy that remembers nothing between steps
        needs no method of its own."""
        if self.sequential:
            found = f"{type(self).__name__}, which has no take_rows"
            raise BadFlag("--strategy", found, "a strategy that can rearrange its sequences, to generate text",
                          "give its class this method (docs/extending.md)")


def defines_weigh(retriever: Retriever) -> bool:
    """Whether the strategy's class has a `weigh` of its own."""
    return type(retriever).weigh is not Retriever.weigh


register_retriever = class_registrar("--strategy", RETRIEVER_REGISTRY, Retriever)
