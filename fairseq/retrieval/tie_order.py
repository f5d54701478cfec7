"""The original's order of entries with equal scores.

The original sorts the entries that it keeps for the next token by numpy's default sort of the float32 scores,
ascending, and reverses the result: `scores.argsort()[::-1]`. This sort is not stable. The order of entries with equal
scores therefore depends on the number of entries, their order before, and the vector instructions for which numpy was
compiled. That order decides which pointers remain after the cut to `--max-knns` and the order of the next candidates,
and so all later orders.

knn-transformers sorts with torch, which leaves entries with equal scores in the order they came in (`stable`, the flag
`--tie-order stable`).

Without equal scores, or where only duplicates of one entry have equal scores, every sort gives the same result. In text
that hardly repeats itself nearly all rows are of this kind, and the only cost is the check whether a row has ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import tie_kernels

NEAR = 2.0**-19  # of the squared norm and the distances; scores of the index were off by 2^-22 of it at most


@dataclass
class Mixed:
    """Rows for which the index was searched and pointers were followed as well. If an entry occurs twice in such a row,
    once from the search and once from a pointer, its two scores were computed in different ways, and the last bits of
    the original's scores decide which copy comes first.

    norms (B,) float32: the squared norms of these rows' queries, -1 for other rows; score(rows, ids) gives the scores
    (n,) of followed entries as the original computes them, from the decoded vector."""

    norms: Tensor
    score: Callable[[Tensor, Tensor], Tensor]


def rows_with_ties(bounds: Tensor, ids: Tensor, scores: Tensor, norms: Tensor | None = None) -> Tensor:
    """(C,) int64: the rows in which entries of different ids have equal scores or, where norms (B,) is not negative,
    scores so close that rounding could make them equal or exchange their order.

    ids, scores (n,), of which row b has those from bounds[b] to bounds[b + 1]; bounds (B + 1,)."""
    count = len(bounds) - 1
    if norms is None:
        norms = scores.new_full((count,), -1)
    if kernels.AVAILABLE and scores.device.type == "cpu":
        found = np.empty(count, np.bool_)
        of_entries = (ids.numpy(), scores.numpy(), scores.view(torch.int32).numpy())
        kernels.run_by_rows(tie_kernels.find_ties, bounds.numpy(), *of_entries, norms.numpy(), NEAR, found)
        return torch.from_numpy(np.flatnonzero(found))
    rows = torch.arange(count, device=ids.device).repeat_interleave(bounds[1:] - bounds[:-1])
    order, close = _close_to_the_next(rows, scores, norms)
    tied = close & (ids[order[1:]] != ids[order[:-1]])
    return torch.unique(rows[order[1:]][tied])


def near_another(rows: Tensor, scores: Tensor, norms: Tensor) -> Tensor:
    """(n,) bool: whether another entry of the same row has an equal score or one within reach of rounding (as in
    `rows_with_ties`). rows (n,) int64 from 0 on, ascending; scores (n,) float32; norms (B,)."""
    order, close = _close_to_the_next(rows, scores, norms)
    near = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    near[order[1:][close]] = True
    near[order[:-1][close]] = True
    return near


def _close_to_the_next(rows: Tensor, scores: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(order (n,), close (n - 1,) bool): positions by row and ascending score, and whether each and the one after it
    are of one row, with scores that are equal or, where norms (B,) is not negative, within reach of rounding."""
    largest = scores.new_zeros(len(norms)).scatter_reduce_(0, rows, scores.abs(), "amax")
    reach = torch.where(norms < 0, 0, NEAR * (norms + largest))
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    rows, scores = rows[order], scores[order]
    return order, (rows[1:] == rows[:-1]) & (scores[1:] - scores[:-1] <= reach[rows[1:]])


def numpy_orders(
    values: NDArray[np.generic], starts: NDArray[np.int64], widths: NDArray[np.int64], stable: bool = False
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Sorts R runs of `values` by numpy's default sort; run i has `widths[i]` values from position `starts[i]` on.

    Yields, for all runs of one width w at a time, their positions (r, w) and the order within each run, (r, w) numbers
    below w. Each run is sorted separately, since the order of equal values depends on the number of values.
    stable: equal values keep the order they came in."""
    for width in np.unique(widths).tolist():
        places = starts[widths == width][:, None] + np.arange(width)
        yield places, np.argsort(values[places], axis=1, kind="stable" if stable else None)


def original_order(scores: Tensor, counts: Tensor, stable: bool = False) -> Tensor:
    """(n,) positions that put each row's scores into the original's order, best first. scores (n,) float32: row b has
    `counts[b]` of them, rows are stored one after the other. stable: equal scores keep the order they came in."""
    widths, values = counts.cpu().numpy(), scores.cpu().numpy()
    order = np.arange(len(values))
    starts = np.cumsum(widths) - widths
    for places, found in numpy_orders(-values if stable else values, starts, widths, stable):
        order[places] = np.take_along_axis(places, found if stable else found[:, ::-1], 1)
    return torch.from_numpy(order).to(scores.device)
