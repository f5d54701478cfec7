"""The automaton (Alon et al., 2022, section 3; with the quirks of the published code, see docs/footguns.md), advanced
for many sequences together.

Its state for a sequence is the set of entries that were retrieved for the last token *and* whose value was the right
token. Their successors in the text, entry + 1, are the pointers: candidates for the next token that need no search.
With clusters, the other members of the pointers' clusters are candidates too. All operations work on flat arrays: entry
`ids[i]` belongs to sequence `rows[i]`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.entries import Entries, as_tensor, bounds_of, no_entries, starts_of
from fairseq.retrieval.kernels import automaton_kernels
from fairseq.retrieval.tie_order import Mixed, near_another, numpy_orders, original_order, rows_with_ties


def best_first(values: Tensor, rows: Tensor) -> Tensor:
    """(n,) positions in ascending order of `rows` (n,) and, within a row, descending order of `values` (n,)."""
    by_value = torch.argsort(values, descending=True, stable=True)
    return by_value[torch.argsort(rows[by_value], stable=True)]


def best_of_rows(values: Tensor, rows: Tensor, counts: Tensor, most: int) -> Tensor:
    """`best_first`, but only the first `most` positions of each row; counts (B,): number of entries of each row."""
    order = best_first(values, rows)
    rank = torch.arange(len(order), device=order.device) - starts_of(counts)[rows[order]]
    return order[rank < most]


class Automaton:
    """The state of following pointers. size: number of entries of the datastore; max_knns: largest number of candidates
    per step from pointers and clusters; stable_ties: equals keep the order they came in, instead of that in which
    numpy's default sort leaves them."""

    def __init__(
        self,
        size: int,
        max_knns: int,
        clusters: Clusters | None = None,
        device: torch.device | str = "cpu",
        stable_ties: bool = False,
    ) -> None:
        self.stable_ties = stable_ties
        self.size, self.max_knns, self.device = size, max_knns, torch.device(device)
        self.clusters = clusters
        if clusters is not None:
            if self.device.type != "cpu":
                clusters.check()  # checks all numbers: on a device, an index out of range would end the process
            self.indptr = as_tensor(clusters.indptr).to(device)
            self.members = as_tensor(clusters.members).to(device)
            self.cluster_of = as_tensor(clusters.cluster_of).to(device)
        self.kept = no_entries(device)

    def reset(self) -> None:
        """Drops all pointers; called when new sequences begin."""
        self.kept = no_entries(self.device)

    def take_rows(self, rows: Tensor) -> None:
        """Sequence i goes on from what was sequence rows[i] (B,) int64; -1 begins without pointers."""
        self.kept = self.kept.of_rows(rows)

    def update(self, matched: Entries, mixed: Mixed | None = None) -> None:
        """Stores the matched entries, that is, those whose value was the right token; in each row, those found by a
        search come first. The datastore's last entry has no successor, so it is dropped; ends of documents inside the
        datastore are ignored, as in the original.

        Rows with ties are put into the original's order (`tie_order`). Other rows are not sorted here, since methods
        that need an order sort by score. mixed: the rows whose entries come both from a search and from pointers, if
        the scores of these two kinds can differ in the last bits."""
        if len(matched) and int(matched.ids.max()) >= self.size - 1:
            matched = matched.select(matched.ids < self.size - 1)
        if len(matched):
            count = int(matched.rows[-1]) + 1
            norms = None if mixed is None else mixed.norms[:count]
            assert matched.scores is not None
            tied = rows_with_ties(matched.within(count), matched.ids, matched.scores, norms)
            if len(tied) and mixed is not None and matched.found is not None:
                matched, tied = self._with_near_scores(matched, tied, mixed)
            if len(tied):
                matched = self._with_ties_ordered(matched, tied, mixed)
        self.kept = matched

    def _with_near_scores(self, matched: Entries, tied: Tensor, mixed: Mixed) -> tuple[Entries, Tensor]:
        """`matched` with the original's scores of followed entries that are so close to another entry that rounding
        could decide, and those of the rows `tied` (C,) in which different entries still have equal scores: only these
        need the order in which the entries came."""
        assert matched.scores is not None and matched.found is not None
        bounds = matched.within(int(tied[-1]) + 1)
        counts = bounds[tied + 1] - bounds[tied]
        own = bounds_of(counts)
        rows = torch.repeat_interleave(torch.arange(len(tied), device=self.device), counts)
        rank = torch.arange(len(rows), device=self.device) - own[rows]
        places = bounds[tied][rows] + rank
        ids, scores, norms = matched.ids[places], matched.scores[places], mixed.norms[tied]
        followed = (rank >= matched.found[tied][rows]) & (norms >= 0)[rows]
        to_score = (near_another(rows, scores, norms) & followed).nonzero().squeeze(1)
        if len(to_score):
            scores[to_score] = mixed.score(tied[rows[to_score]], ids[to_score])
            of_all = matched.scores.clone()
            of_all[places] = scores
            matched = Entries(matched.rows, matched.ids, of_all, bounds=matched.bounds, found=matched.found)
        return matched, tied[rows_with_ties(own, ids, scores)]

    def _with_ties_ordered(self, matched: Entries, tied: Tensor, mixed: Mixed | None) -> Entries:
        """`matched` with the rows `tied` (C,) in the original's order."""
        assert matched.scores is not None
        count = int(tied[-1]) + 1
        chosen = torch.zeros(count, dtype=torch.bool, device=self.device)
        chosen[tied] = True
        bounds = matched.within(count)
        places = chosen.repeat_interleave(bounds[1:] - bounds[:-1]).nonzero().squeeze(1)
        ordered = self._as_they_came(matched.select(places), chosen, mixed)
        assert ordered.scores is not None
        order = original_order(ordered.scores, ordered.counts(count), self.stable_ties)
        ids, scores = matched.ids.clone(), matched.scores.clone()
        ids[places], scores[places] = ordered.ids[order], ordered.scores[order]
        return Entries(matched.rows, ids, scores, bounds=matched.bounds)

    def _as_they_came(self, matched: Entries, chosen: Tensor, mixed: Mixed | None) -> Entries:
        """`matched`, which has only entries of the rows `chosen` (B,) bool, in the order that the original has before
        it sorts: first what the search found, then pointers and members in the order of the sort at the step before.

        The candidates of this step were not put into that order, because it matters only for rows with ties. It is
        therefore computed here, from the entries that were kept at the step before."""
        assert matched.scores is not None
        count = len(chosen)
        given = self.in_original_order(count, chosen)
        if not len(given):
            return matched
        followed = given.select(torch.isin(self._keys(given), self._keys(matched)))
        found = matched.counts(count) - followed.counts(count)  # by a search; all copies of an entry match or none does
        rank = torch.arange(len(matched), device=self.device) - matched.within(count)[matched.rows]
        given_before = matched.select(rank >= found[matched.rows])
        assert given_before.scores is not None
        sorted_keys, by_key = self._keys(given_before).sort()
        scores = given_before.scores[by_key][torch.searchsorted(sorted_keys, self._keys(followed))]
        if mixed is not None:
            both = (mixed.norms[followed.rows] >= 0).nonzero().squeeze(1)
            scores[both] = mixed.score(followed.rows[both], followed.ids[both])
        first = matched.select(rank < found[matched.rows])
        assert first.scores is not None
        rows = torch.cat([first.rows, followed.rows])
        together = Entries(rows, torch.cat([first.ids, followed.ids]), torch.cat([first.scores, scores]))
        return together.select(torch.argsort(rows, stable=True))

    def in_original_order(self, sequences: int, chosen: Tensor | None = None) -> Entries:
        """The pointers and cluster members of the first `sequences` sequences, or of those of them that are `chosen`
        (B,) bool, in the original's order: pointers by descending score, then members, those of the clusters with most
        pointers first."""
        kept = self.kept.of_first(sequences)
        if chosen is not None:
            kept = kept.select(chosen[kept.rows])
        if not len(kept):
            return kept
        return self.expand(self._best(kept, sequences), sequences, all_by_votes=True)

    def _keys(self, entries: Entries) -> Tensor:
        """(n,) a number that is unique for each pair of row and id; an id may be -1."""
        return entries.rows * (self.size + 1) + entries.ids + 1

    def pointers(self, sequences: int) -> tuple[Entries, Tensor]:
        """The pointers of the first `sequences` sequences, and (sequences,) how many each had before the cut.

        If a sequence has more than `max_knns` pointers, those with the best scores at the previous step are kept."""
        kept = self.kept.of_first(sequences)
        counts = kept.counts(sequences)
        if len(kept) and int(counts.max()) > self.max_knns:
            return self._best(kept, sequences), counts
        return Entries(kept.rows, kept.ids + 1, bounds=kept.within(sequences)), counts

    def _best(self, kept: Entries, sequences: int) -> Entries:
        """Pointers of at most `max_knns` entries per row, best first. Entries with equal scores stay in the order in
        which `keep` stored them."""
        assert kept.scores is not None
        kept = kept.select(best_of_rows(kept.scores, kept.rows, kept.counts(sequences), self.max_knns))
        return Entries(kept.rows, kept.ids + 1)

    def expand(self, pointers: Entries, sequences: int, all_by_votes: bool = False) -> Entries:
        """Adds the members of the pointers' clusters, up to `max_knns` entries per sequence.

        Clusters with more pointers come first, members in ascending order. A pointer is also a member of its cluster,
        so it occurs twice, and the original's softmax counts both. Without clusters, returns `pointers`.

        all_by_votes: sort clusters by their number of pointers even where all members fit, when the order matters only
        for ties."""
        if self.clusters is None or not len(pointers):
            return pointers
        if kernels.AVAILABLE and self.device.type == "cpu":
            return self._expand_compiled(pointers, sequences, all_by_votes)
        counts = pointers.counts(sequences)
        capacity = (self.max_knns - counts).clamp_(min=0)  # how many members each sequence may add
        own = self.cluster_of[pointers.ids]
        self._require((own >= 0) & (own < self.clusters.count))
        keys = pointers.rows * self.clusters.count + own
        states, votes = torch.unique(keys, return_counts=True)
        rows, clusters = states // self.clusters.count, states % self.clusters.count
        begin, end = self.indptr[clusters], self.indptr[clusters + 1]
        self._require((begin >= 0) & (begin <= end) & (end <= len(self.members)))
        sizes = end - begin
        widths = torch.bincount(rows, minlength=sequences)
        available = torch.zeros_like(capacity).index_add_(0, rows, sizes)
        order = _most_voted_first(votes, widths, (available > capacity) | all_by_votes, self.stable_ties)
        clusters = clusters[order]
        rows, sizes = rows[order], sizes[order]

        # How many members of each cluster fit: sizes are cut where their running sum in the sequence exceeds capacity.
        before = starts_of(sizes)
        before = before - before[starts_of(widths)[rows]]
        take = torch.minimum(sizes, capacity[rows] - before).clamp_(min=0)
        total = int(take.sum())
        source = torch.repeat_interleave(self.indptr[clusters] - starts_of(take), take, output_size=total)
        source += torch.arange(total, device=self.device)
        found = self.members[source].long()
        self._require((found >= 0) & (found < self.size))
        added = Entries(torch.repeat_interleave(rows, take, output_size=total), found)
        return merge_by_row(pointers, added, counts, sequences)

    def _expand_compiled(self, pointers: Entries, sequences: int, all_by_votes: bool) -> Entries:
        """`expand` by compiled loops."""
        assert self.clusters is not None
        starts, pointer_ids = pointers.within(sequences).numpy(), pointers.ids.numpy()
        indptr, members, cluster_of = self.indptr.numpy(), self.members.numpy(), self.cluster_of.numpy()
        clusters, votes = np.empty((2, len(pointer_ids)), np.int64)
        widths, available = np.empty((2, sequences), np.int64)
        found = (clusters, votes, widths, available)
        arrays = (pointer_ids, cluster_of, indptr, len(members))
        kernels.run_by_rows(automaton_kernels.find_states, starts, *arrays, *found)
        self.clusters.require(int(available.min()) >= 0)
        counts = starts[1:] - starts[:-1]
        capacity = np.maximum(self.max_knns - counts, 0)  # how many members each sequence may add
        to_sort = np.flatnonzero(((available > capacity) | all_by_votes) & (widths > 1))
        if len(to_sort):
            _sort_by_votes(clusters, votes, starts[to_sort], widths[to_sort], self.stable_ties)
        bounds = np.zeros(sequences + 1, np.int64)
        np.cumsum(counts + np.minimum(capacity, available), out=bounds[1:])
        ids, rows = np.empty((2, int(bounds[-1])), np.int64)
        fine = np.empty(sequences, np.bool_)
        sources = (starts, pointer_ids, clusters, indptr, members, self.size)
        kernels.run_by_rows(automaton_kernels.emit_members, bounds, *sources, ids, rows, fine)
        self.clusters.require(bool(fine.all()))
        return Entries(torch.from_numpy(rows), torch.from_numpy(ids), bounds=torch.from_numpy(bounds))

    def _require(self, fine: Tensor) -> None:
        """BadFile unless `fine` (n,) bool is True everywhere: numbers read from the clusters' arrays are in range.
        (Large arrays of clusters are checked only where they are used.)"""
        assert self.clusters is not None
        if self.device.type == "cpu":
            self.clusters.require(bool(fine.all()))


def _most_voted_first(votes: Tensor, widths: Tensor, chosen: Tensor, stable: bool = False) -> Tensor:
    """A permutation that sorts the clusters of the sequences `chosen` (B,) bool by descending votes; widths (B,):
    number of clusters of each sequence."""
    device, order = votes.device, np.arange(len(votes))
    these, sizes = (chosen & (widths > 1)).cpu().numpy(), widths.cpu().numpy()
    _sort_by_votes(order, votes.cpu().numpy(), (np.cumsum(sizes) - sizes)[these], sizes[these], stable)
    return torch.from_numpy(order).to(device)


def _sort_by_votes(
    clusters: NDArray[np.int64],
    votes: NDArray[np.int64],
    starts: NDArray[np.int64],
    widths: NDArray[np.int64],
    stable: bool = False,
) -> None:
    """Sorts R runs of clusters by descending votes, in place; run i has `widths[i]` clusters from `starts[i]` on.

    Clusters with equal votes are left in the order of numpy's default sort: the original's truncation, and so its
    results, depend on that order. stable: they stay in ascending order, as in knn-transformers."""
    for places, order in numpy_orders(-votes, starts, widths, stable):
        clusters[places] = np.take_along_axis(clusters[places], order, 1)


def merge_by_row(first: Entries, second: Entries, first_counts: Tensor, sequences: int) -> Entries:
    """The entries of both in ascending order of rows, within a row those of `first` before those of `second`. The rows
    of both must already be ascending; first_counts (B,): number of entries of `first` in each row."""
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
