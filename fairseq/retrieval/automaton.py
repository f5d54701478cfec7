"""The automaton (Alon et al., 2022, section 3; with the quirks of the published code, see docs/footguns.md), advanced
for many sequences in lock-step.

A state of the traversal is the set of entries that were retrieved for the last token *and* whose value was the token
that came. Their successors in the text, entry + 1, are the pointers: candidates for the next token that cost no search.
With clusters, the other members of the pointers' clusters are candidates too. All operations work on flat arrays:
`rows[i]` says to which sequence entry `ids[i]` belongs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.entries import Entries, as_tensor, no_entries, starts_of
from fairseq.retrieval.kernels import automaton_kernels


def best_first(values: Tensor, rows: Tensor) -> Tensor:
    """(n,) positions in ascending order of `rows` (n,) and, within a row, descending order of `values` (n,)."""
    by_value = torch.argsort(values, descending=True, stable=True)
    return by_value[torch.argsort(rows[by_value], stable=True)]


def best_of_rows(values: Tensor, rows: Tensor, counts: Tensor, most: int) -> Tensor:
    """`best_first`, but only the first `most` positions of each row; counts (B,) are the rows' numbers of entries."""
    order = best_first(values, rows)
    rank = torch.arange(len(order), device=order.device) - starts_of(counts)[rows[order]]
    return order[rank < most]


class Automaton:
    """Pointer-following state. `size`: entries of the datastore; `max_knns`: most candidates from pointers a step."""

    def __init__(
        self, size: int, max_knns: int, clusters: Clusters | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.size, self.max_knns, self.device = size, max_knns, torch.device(device)
        self.clusters = clusters
        if clusters is not None:
            if self.device.type != "cpu":
                clusters.check()  # all of it goes to the device, where an index out of range ends the process
            self.indptr = as_tensor(clusters.indptr).to(device)
            self.members = as_tensor(clusters.members).to(device)
            self.cluster_of = as_tensor(clusters.cluster_of).to(device)
        self.kept = no_entries(device)

    def reset(self) -> None:
        """Forgets everything; called when new sequences begin."""
        self.kept = no_entries(self.device)

    def keep(self, matched: Entries) -> None:
        """Takes over the entries whose value was the token that came. The datastore's last entry has no successor, so
        it is dropped; ends of documents inside the datastore are ignored, as in the original."""
        has_last = len(matched) and int(matched.ids.max()) >= self.size - 1
        self.kept = matched.select(matched.ids < self.size - 1) if has_last else matched

    def pointers(self, sequences: int) -> tuple[Entries, Tensor]:
        """Pointers of the first `sequences` sequences and how many each had before the cut to `max_knns`.

        Where a sequence has more than `max_knns`, those with the best scores at the previous step stay."""
        kept = self.kept.of_first(sequences)
        counts = kept.counts(sequences)
        if len(kept) and int(counts.max()) > self.max_knns:
            assert kept.scores is not None
            kept = kept.select(best_of_rows(kept.scores, kept.rows, counts, self.max_knns))
        return Entries(kept.rows, kept.ids + 1, bounds=kept.within(sequences)), counts

    def expand(self, pointers: Entries, sequences: int) -> Entries:
        """Adds the members of the pointers' clusters, up to `max_knns` entries a sequence.

        Clusters with more pointers come first, members in ascending order; a pointer is its own cluster's member and so
        stands twice, which the original's softmax counts. Without clusters: the pointers themselves."""
        if self.clusters is None or not len(pointers):
            return pointers
        if kernels.AVAILABLE and self.device.type == "cpu":
            return self._expand_compiled(pointers, sequences)
        counts = pointers.counts(sequences)
        room = (self.max_knns - counts).clamp_(min=0)
        own = self.cluster_of[pointers.ids]
        self._require((own >= 0) & (own < self.clusters.count))
        keys = pointers.rows * self.clusters.count + own
        states, votes = torch.unique(keys, return_counts=True)
        rows, clusters = states // self.clusters.count, states % self.clusters.count
        begin, end = self.indptr[clusters], self.indptr[clusters + 1]
        self._require((begin >= 0) & (begin <= end) & (end <= len(self.members)))
        sizes = end - begin
        widths = torch.bincount(rows, minlength=sequences)
        available = torch.zeros_like(room).index_add_(0, rows, sizes)
        order = self._most_voted_first(rows, votes, widths, available > room)
        clusters = clusters[order]
        rows, sizes = rows[order], sizes[order]

        # How many members of each cluster fit: sizes cut where their running sum within the sequence passes the room.
        before = starts_of(sizes)
        before = before - before[starts_of(widths)[rows]]
        take = torch.minimum(sizes, room[rows] - before).clamp_(min=0)
        total = int(take.sum())
        source = torch.repeat_interleave(self.indptr[clusters] - starts_of(take), take, output_size=total)
        source += torch.arange(total, device=self.device)
        found = self.members[source].long()
        self._require((found >= 0) & (found < self.size))
        added = Entries(torch.repeat_interleave(rows, take, output_size=total), found)
        return merge_by_row(pointers, added, counts, sequences)

    def _expand_compiled(self, pointers: Entries, sequences: int) -> Entries:
        """The same by compiled loops."""
        assert self.clusters is not None
        starts, named = pointers.within(sequences).numpy(), pointers.ids.numpy()
        indptr, members, cluster_of = self.indptr.numpy(), self.members.numpy(), self.cluster_of.numpy()
        clusters, votes = np.empty((2, len(named)), np.int64)
        widths, available = np.empty((2, sequences), np.int64)
        found = (clusters, votes, widths, available)
        kernels.run_by_rows(automaton_kernels.find_states, starts, named, cluster_of, indptr, len(members), *found)
        self.clusters.require(int(available.min()) >= 0)
        counts = starts[1:] - starts[:-1]
        room = np.maximum(self.max_knns - counts, 0)  # how many members each sequence may add
        crowded = np.flatnonzero((available > room) & (widths > 1))
        if len(crowded):
            _sort_by_votes(clusters, votes, starts[crowded], widths[crowded])
        bounds = np.zeros(sequences + 1, np.int64)
        np.cumsum(counts + np.minimum(room, available), out=bounds[1:])
        ids, rows = np.empty((2, int(bounds[-1])), np.int64)
        fine = np.empty(sequences, np.bool_)
        taken = (starts, named, clusters, indptr, members, self.size)
        kernels.run_by_rows(automaton_kernels.emit_members, bounds, *taken, ids, rows, fine)
        self.clusters.require(bool(fine.all()))
        return Entries(torch.from_numpy(rows), torch.from_numpy(ids), bounds=torch.from_numpy(bounds))

    def _require(self, fine: Tensor) -> None:
        """Of clusters that were not looked at as a whole: numbers taken out of them are in their ranges."""
        assert self.clusters is not None
        if self.device.type == "cpu":
            self.clusters.require(bool(fine.all()))

    def _most_voted_first(self, rows: Tensor, votes: Tensor, widths: Tensor, crowded: Tensor) -> Tensor:
        """A permutation that puts each sequence's clusters in descending order of votes. Only sequences whose clusters
        do not all fit need it: `crowded` (B,) bool; widths (B,) are the sequences' numbers of clusters. Off the CPU,
        clusters with equal votes stand in ascending order."""
        if self.device.type != "cpu":
            return best_first(votes, rows)
        order, chosen = np.arange(len(rows)), (crowded & (widths > 1)).numpy()
        _sort_by_votes(order, votes.numpy(), starts_of(widths).numpy()[chosen], widths.numpy()[chosen])
        return torch.from_numpy(order)


def _sort_by_votes(
    clusters: NDArray[np.int64], votes: NDArray[np.int64], starts: NDArray[np.int64], widths: NDArray[np.int64]
) -> None:
    """Puts each run of clusters, of `widths` (R,) from `starts` (R,) on, in descending order of votes, in place.

    Clusters with equal votes stand as numpy's default sort leaves them: the original's truncation, and so its numbers,
    depend on that."""
    for width in np.unique(widths).tolist():
        these = starts[widths == width][:, None] + np.arange(width)
        order = np.argsort(-votes[these], axis=1)
        clusters[these] = np.take_along_axis(clusters[these], order, 1)


def merge_by_row(first: Entries, second: Entries, first_counts: Tensor, sequences: int) -> Entries:
    """Both, in ascending order of rows, `first` before `second` within a row; both must be ascending already."""
    starts = starts_of(first_counts + second.counts(sequences))
    at_first = torch.arange(len(first), device=first.rows.device) + (starts - starts_of(first_counts))[first.rows]
    second_counts = second.counts(sequences)
    offset = starts + first_counts - starts_of(second_counts)
    at_second = torch.arange(len(second), device=first.rows.device) + offset[second.rows]
    rows = torch.empty(len(first) + len(second), dtype=torch.int64, device=first.rows.device)
    ids = torch.empty_like(rows)
    rows[at_first], ids[at_first] = first.rows, first.ids
    rows[at_second], ids[at_second] = second.rows, second.ids
    return Entries(rows, ids)
