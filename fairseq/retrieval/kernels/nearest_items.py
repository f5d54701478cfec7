"""The k nearest entries found so far for each query. An item is one 64-bit number: the bits of the distance, then the
entry. Distances are not negative, so that items sort by distance and, where distances are equal, by entry."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import exact_kernels

UNFOUND = torch.finfo(torch.float32).max  # distance that goes with an id of -1, as in FAISS
ENTRY_BITS = 32  # of an item
NOTHING = np.uint64(2**64 - 1)  # padding: an item that sorts after all others


class NearestItems:
    """The nearest entries found so far, updated by compiled loops.

    items (B, 2 k + spare) uint64, of which row b has counts[b]; furthest (B,): a distance that k of them do not exceed,
    infinite as long as fewer than k were found."""

    def __init__(self, queries: Tensor, k: int, spare: int = 256) -> None:
        self.queries, self.k = queries.contiguous().numpy(), k
        self.items = np.empty((len(queries), 2 * k + spare), np.uint64)
        self.counts = np.zeros(len(queries), np.int64)
        self.furthest = np.full(len(queries), np.inf, np.float32)

    def offer(self, scores: Tensor, slack: Tensor, keys: Tensor, start: int) -> None:
        """scores (B, n), slack (B,): see `exact_kernels.offer_block`; keys (n, D) float32, the first of which is entry
        `start`."""
        arrays = (scores.numpy(), slack.numpy(), self.queries, keys.numpy(), start, self.k)
        bounds = np.arange(len(self.counts) + 1)
        kernels.run_by_rows(exact_kernels.offer_block, bounds, *arrays, self.items, self.counts, self.furthest)

    def result(self, *others: NearestItems) -> tuple[Tensor, Tensor]:
        """(distances, ids), both (B, k), nearest first, of the entries in this object and in `others`; padded with ids
        of -1."""

        def of_rows(first: int, last: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            found = []
            for part in (self, *others):
                counts = part.counts[first:last, None]
                items = part.items[first:last, : max(self.k, int(counts.max(initial=0)))]
                items[np.arange(items.shape[1]) >= counts] = NOTHING
                found.append(items)
            return nearest_items(np.concatenate(found, axis=1) if others else found[0], self.k)

        if not self.k:
            return torch.zeros(len(self.items), 0), torch.zeros(len(self.items), 0, dtype=torch.int64)
        parts = kernels.in_threads(of_rows, len(self.items))
        distances, ids = (torch.from_numpy(np.concatenate(of_all)) for of_all in zip(*parts, strict=True))
        return distances, ids


def packed_items(distances: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Distances, at least 0, and entries below 2^32 as items; NOTHING for an id of -1."""
    items = distances.view(np.uint32).astype(np.uint64) << np.uint64(ENTRY_BITS) | ids.astype(np.uint64)
    items[ids < 0] = NOTHING
    return items


def nearest_items(items: NDArray[np.uint64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(distances, ids), both (B, k), of the k smallest of the items (B, C >= k), which are reordered in place; an id of
    -1 for NOTHING."""
    if items.shape[1] > 2 * k:
        items.partition(k - 1, axis=1)
        items = items[:, :k]
    best = np.sort(items, axis=1)[:, :k]
    distances = (best >> np.uint64(ENTRY_BITS)).astype(np.uint32).view(np.float32)
    ids = (best & np.uint64((1 << ENTRY_BITS) - 1)).astype(np.int64)
    distances[best == NOTHING], ids[best == NOTHING] = UNFOUND, -1
    return distances, ids
