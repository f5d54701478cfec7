"""RetoMaton with chains: the same automaton, which also records for how many steps each pointer has been right.

An entry reached by L pointers in a row continues a text that agrees with the evaluated text in its last L words, and
the larger L is, the likelier the entry is right again. The published code makes some use of this by accident: it keeps
duplicates, so that with a search at every token such an entry votes about L + 1 times. Here it votes (1 + L) **
`--chain-power` times, with any `--min-knns`; duplicates are dropped, so that `--min-knns` counts distinct entries;
lambda depends on the longest chain of the token; and more members of the clusters are scored than the first 1,024."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from fairseq.flag_types import natural_float, positive_int
from fairseq.retrieval.automaton import Automaton, best_of_rows
from fairseq.retrieval.entries import Entries, no_entries, starts_of
from fairseq.retrieval.retrievers.interface import Proposal, Resources, Retriever, Step, register_retriever

HEAVIEST = 1e30  # largest weight of an entry's vote, so that sums of them do not overflow


@register_retriever("retomaton_chains")
class ChainsRetriever(Retriever):
    """Searches when fewer than `--min-knns` distinct entries were kept from the last token."""

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        self.size = resources.size
        self.automaton = Automaton(self.size, args.pool, resources.clusters, resources.device)

    @staticmethod
    def add_args(parser: Any) -> None:
        """`--chain-power`, `--chain-trust`, `--pool`."""
        add = parser.add_argument
        add("--chain-power", type=natural_float, default=4.0, metavar="P", help="a chain of L votes (1 + L) ** P times")
        add(
            "--chain-trust",
            type=natural_float,
            default=0.8,
            metavar="G",
            help="the odds of lambda grow with ((1 + L) / 2) ** G for the longest chain L; 0: constant lambda",
        )
        add("--pool", type=positive_int, default=4096, metavar="N", help="most pointers and cluster members to score")

    def start(self) -> None:
        """Drops all pointers."""
        self.pointers = no_entries(self.resources.device)  # sorted by row and id, without duplicates
        self.lengths = torch.zeros(0, dtype=torch.int64, device=self.resources.device)  # (n,) length of each chain

    def propose(self, step: Step) -> Proposal:
        """The pointers with their votes, the members of their clusters, and lambda by the longest chain."""
        count = len(step)
        running = self.pointers.rows < count
        self.pointers, self.lengths = self.pointers.select(running), self.lengths[running]
        kept = self.pointers.counts(count)
        self._cut(kept)
        entries = self.automaton.expand(self.pointers, count)
        # In each row, pointers come before members.
        offset = starts_of(entries.counts(count)) - starts_of(self.pointers.counts(count))
        place = torch.arange(len(self.lengths), device=offset.device) + offset[self.pointers.rows]
        entries.weights = torch.ones(len(entries), device=offset.device)
        entries.weights[place] = ((1 + self.lengths.float()) ** self.args.chain_power).clamp(max=HEAVIEST)
        return Proposal(kept < self.args.min_knns, entries, self._lmbda(count))

    def _cut(self, kept: Tensor) -> None:
        """Keeps the longest chains where a row has more than `--pool` of them."""
        if not len(kept) or int(kept.max()) <= self.args.pool:
            return
        chosen = best_of_rows(self.lengths, self.pointers.rows, kept, self.args.pool).sort().values
        self.pointers, self.lengths = self.pointers.select(chosen), self.lengths[chosen]

    def _lmbda(self, count: int) -> Tensor:
        """(B,): lambda of each token, which is --lmbda where the longest chain has length 1, a new pointer."""
        longest = torch.zeros(count, dtype=torch.int64, device=self.lengths.device)
        longest.scatter_reduce_(0, self.pointers.rows, self.lengths, "amax")
        lmbda = min(max(self.resources.lmbda, 1e-12), 1 - 1e-12)
        trust = self.args.chain_trust * (torch.log1p(longest.float()) - math.log(2))
        return torch.sigmoid(math.log(lmbda) - math.log1p(-lmbda) + trust)

    def observe(self, step: Step, matched: Entries) -> None:
        """The successors of the matched entries become the next pointers, without duplicates. If a matched entry was a
        pointer, its chain becomes longer by 1; else a chain of length 1 begins."""
        has_successor = (matched.ids >= 0) & (matched.ids < self.size - 1)
        keys = torch.unique((matched.rows * self.size + matched.ids)[has_successor])
        pointer_keys = self.pointers.rows * self.size + self.pointers.ids
        lengths = torch.ones_like(keys)
        if len(pointer_keys):
            place = torch.searchsorted(pointer_keys, keys).clamp(max=len(pointer_keys) - 1)
            lengths += torch.where(pointer_keys[place] == keys, self.lengths[place], 0)
        self.pointers, self.lengths = Entries(keys // self.size, keys % self.size + 1), lengths

    def take_rows(self, rows: Tensor) -> None:
        """Pointers and the lengths of their chains go with the sequences."""
        places, _ = self.pointers.places_of_rows(rows)
        self.pointers, self.lengths = self.pointers.of_rows(rows), self.lengths[places]
