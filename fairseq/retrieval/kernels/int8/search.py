"""Int8 search: what docs/int8.md describes, for the exact index."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import BadFlag
from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import exact_kernels, intrinsics
from fairseq.retrieval.kernels.int8 import loops
from fairseq.retrieval.kernels.int8.layout import TILE_KEYS
from fairseq.retrieval.kernels.int8.rounding import Rounded, Rounding, likely_furthest
from fairseq.retrieval.kernels.nearest_items import NearestItems

SWITCH = "FAIRSEQ_INT8"  # environment variable
WIDEST = 1 << 16  # dimension up to which int32 is sure to hold sums of products
BLOCK_NUMBERS, LARGEST_BLOCK = 1 << 18, 960  # numbers of a block of keys, which the cache holds, and keys


def use_int8(dimension: int) -> bool:
    """Whether exact search of keys of this dimension uses int8: where the processor multiplies int8 numbers fast and
    without saturation, unless FAIRSEQ_INT8=0 turns it off. BadFlag for another value than 0 and 1."""
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise BadFlag(SWITCH, repr(switch), "0 (exact search without int8) or 1 (with it)", "set another or unset it")
    return switch == "1" and intrinsics.HAS_VNNI and intrinsics.READS_FLOAT16 and dimension <= WIDEST


class Found(NamedTuple):
    """distances (B, k) and ids (B, k), nearest first; rows (n,): the queries that int8 search could not answer, whose
    distances and ids say nothing; all_finite: whether all keys are."""

    distances: Tensor
    ids: Tensor
    unanswered: Tensor
    all_finite: bool


class Int8Search:
    """Exact search of keys (N, D), float16 or float32, by estimates from int8 products. It needs numba.

    entries (n,), sample (n, D): some of the keys, all finite; centre (D,): any vector, best their mean."""

    def __init__(
        self,
        keys: NDArray[np.floating],
        entries: NDArray[np.int64],
        sample: NDArray[np.float32],
        centre: NDArray[np.float32],
    ) -> None:
        self.keys: NDArray[Any] = np.asarray(keys.view(np.uint16) if keys.itemsize == 2 else keys)
        self.rounding = Rounding(sample, centre)
        self.entries, self.sample = entries, self.rounding.rounded(sample, are_queries=False)

    def search(self, queries: Tensor, k: int) -> Found:
        """The k >= 1 nearest of at least k keys for queries (B >= 1, D) float32; each thread takes a share of the
        keys."""
        rounding = self.rounding
        rounded = rounding.rounded(queries.contiguous().numpy(), are_queries=True)
        furthest = self._likely_furthest(queries, rounded, k)
        block = max(1, min(LARGEST_BLOCK, BLOCK_NUMBERS // rounding.width) // TILE_KEYS) * TILE_KEYS
        sum_error = np.float32(2.0**-21 * (rounding.width + 32))

        def nearest(first: int, last: int) -> tuple[NearestItems, tuple[int, int]]:
            best = NearestItems(queries, k, block)
            best.furthest[:] = furthest
            fixed = (self.keys, *rounding.parameters, *rounded, sum_error, block)
            changing = (best.queries, k, best.items, best.counts, best.furthest)
            return best, loops.offer_keys(first, last, *fixed, *changing)

        parts = kernels.in_threads(nearest, len(self.keys))
        unrounded, huge = np.sum([counts for _, counts in parts], axis=0)
        best, *others = (items for items, _ in parts)
        distances, ids = best.result(*others)
        # Of huge keys, distances might be finite; of other keys that cannot be rounded, they are not.
        unanswered = torch.arange(len(ids)) if huge else (ids[:, -1] < 0).nonzero().squeeze(1)
        return Found(distances, ids, unanswered, not unrounded)

    def _likely_furthest(self, queries: Tensor, rounded: Rounded, k: int) -> Any:
        """(B,): distances that likely more than k entries do not exceed; infinite where the sample cannot tell."""
        places = likely_furthest(rounded, self.sample, float(self.rounding.step), k / len(self.keys))
        if not len(places):
            return np.inf
        distances = np.empty(len(places), np.float32)
        arrays = (queries.contiguous().numpy(), self.entries[places], self.keys, distances)
        kernels.run_by_rows(exact_kernels.key_distances, np.arange(len(places) + 1), *arrays)
        return distances * np.float32(1.0001)  # entries exactly as far are among them
