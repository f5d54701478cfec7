"""RetoMaton (Alon et al., 2022): pointers and clusters replace searches. Results equal those of the published code."""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

from fairseq.retrieval.automaton import Automaton
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.retrievers.interface import Proposal, Resources, Retriever, Step, register_retriever
from fairseq.retrieval.tie_order import Mixed


@register_retriever("retomaton")
class RetomatonRetriever(Retriever):
    """Searches when fewer than `--min-knns` entries were kept from the last token; the count is of entries (duplicates
    included) before clusters are expanded, not of states as in the paper."""

    only_mixes = True

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        max_knns = args.max_knns if args.max_knns is not None else resources.k
        stable = getattr(args, "tie_order", "original") == "stable"
        self.automaton = Automaton(resources.size, max_knns, resources.clusters, resources.device, stable)

    def start(self) -> None:
        """Drops the pointers of earlier sequences."""
        self.automaton.reset()
        self.followed = torch.zeros(0, dtype=torch.int64, device=self.automaton.device)

    def propose(self, step: Step) -> Proposal:
        """Pointers, expanded by their clusters; a search where too few entries survived the last token."""
        pointers, kept = self.automaton.pointers(len(step))
        self.followed = kept
        return Proposal(search=kept < self.args.min_knns, entries=self.automaton.expand(pointers, len(step)))

    def observe(self, step: Step, matched: Entries) -> None:
        """The entries with the right value become the state, whose successors are the next pointers."""
        self.automaton.update(matched, self._mixed(step))

    def take_rows(self, rows: Tensor) -> None:
        """Pointers go with the sequences, and so do their numbers."""
        self.automaton.take_rows(rows)
        if len(self.followed):
            self.followed = torch.where(rows < 0, 0, self.followed[rows])

    def _mixed(self, step: Step) -> Mixed | None:
        """The rows with both a search and pointers, whose scores differ in the last bits. With `--min-knns 1` there are
        none, because a search is made only where no pointer is left."""
        similarity = self.resources.similarity
        if self.args.min_knns <= 1 or similarity is None or not similarity.rebuilds:
            return None
        mixed = (self.followed > 0) & (self.followed < self.args.min_knns)
        norms = torch.where(mixed, step.queries.square().sum(1), -1)
        return Mixed(norms, functools.partial(similarity.of_rebuilt, step.queries))
