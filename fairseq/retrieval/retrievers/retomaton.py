"""RetoMaton (Alon et al., 2022): pointers and clusters replace searches; the published code's behaviour to the
digit."""

from __future__ import annotations

import argparse

from fairseq.retrieval.automaton import Automaton
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.retrievers.interface import Proposal, Resources, Retriever, Step, register_retriever


@register_retriever("retomaton")
class RetomatonRetriever(Retriever):
    """Searches when fewer than `--min-knns` entries were kept from the last token; the count is of entries (duplicates
    included) before clusters are expanded, not of states as in the paper."""

    only_mixes = True

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        max_knns = args.max_knns if args.max_knns is not None else resources.k
        self.automaton = Automaton(resources.size, max_knns, resources.clusters, resources.device)

    def start(self) -> None:
        """A new group of sequences: nothing has been retrieved yet."""
        self.automaton.reset()

    def propose(self, step: Step) -> Proposal:
        """Pointers, expanded by their clusters; a search where too few entries survived the last token."""
        pointers, kept = self.automaton.pointers(len(step))
        return Proposal(search=kept < self.args.min_knns, entries=self.automaton.expand(pointers, len(step)))

    def observe(self, step: Step, matched: Entries) -> None:
        """The entries with the right value are the state from which the next pointers start."""
        self.automaton.keep(matched)
