"""The exact index's first pass (`exact`) where the processor multiplies 8 bit numbers fast: of every query, the few
entries that may be among its k nearest, found by products of whole numbers, which cost half of bfloat16 ones.

Vectors are rounded to multiples of one step. A coordinate that needs more than 8 bits is cut into several columns, each
of at most 127 steps, so wide coordinates cost more columns, and the step may be small for all. Nothing is assumed of
how well that fits: what rounding and clipping took from each vector is measured, and bounds the error of a product,

    |<q, x> - <q', x'>| <= |(q - q') / w| |x w| + |q' w| |(x - x') / w|    for any weights w (Cauchy and Schwarz),

so each half distance lies between two bounds. The k-th least upper bound is one of the k-th distance: entries whose
lower bound is above it are dropped. Distances themselves are computed at the end, for the k entries with the least
upper bounds and then for those that may be nearer than the furthest of these; their keys are read in file order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels, whole_kernels

EXTRA = 0.1875  # columns added for coordinates that need more than one
SPAN = 4.0  # standard deviations that columns cover; what lies beyond is clipped
LIMIT = 127  # steps that a column holds
ROOM = 4  # times k: bounds kept of a query before those above the limit are dropped
LARGEST = 1e36  # squared norm that float32 sums hold safely
BLOCK = 512  # keys looked at together, for each of which a product with each query is kept
SHIFT = np.uint64(32)
NOTHING = np.uint64(2**64 - 1)


def is_fast() -> bool:
    """Whether the processor multiplies 8 bit numbers into sums of 32 bits, fast and without saturation."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return hasattr(torch, "_int_mm") and bool(known.get("avx512_vnni") or known.get("amx_int8"))


class Columns:
    """How vectors become rows of 8 bit numbers, chosen from some of the keys (n, D)."""

    def __init__(self, some: NDArray[np.float32], centre: NDArray[np.float32]) -> None:
        dimension = some.shape[1]
        spread = np.square(some - centre, dtype=np.float64).mean(0) ** 0.5 if len(some) else np.ones(dimension)
        spread = np.maximum(spread, max(1e-6 * float(spread.max(initial=0)), 1e-30))
        width = max(-(-round(dimension * (1 + EXTRA)) // 64) * 64, dimension)
        self.centre, self.step = centre, np.float32(_least_step(spread, width))
        parts = np.ceil(SPAN * spread / (LIMIT * float(self.step))).astype(np.int64)
        self.reach = (parts * LIMIT).astype(np.float32)
        weight = spread / spread.max(initial=0)
        self.weight = np.stack([weight, 1 / weight]).astype(np.float32)  # w^-2 and w^2
        several = [
            (d, key_part, query_part)
            for d in np.flatnonzero(parts > 1)
            for key_part in range(parts[d])
            for query_part in range(parts[d])
            if key_part or query_part
        ]
        self.extra = np.array(several, np.int64).reshape(-1, 3)
        self.width = max(width, dimension + len(self.extra))

    def rounded(self, vectors: NDArray[np.float32], are_queries: bool) -> tuple[Tensor, NDArray[np.float32]]:
        """(rows (n, W) int8, facts (4, n)) of vectors (n, D). Facts: half the squared norm; the norm of x w; that of
        what rounding took, over w; that of x' w."""
        rows = torch.zeros(len(vectors), self.width, dtype=torch.int8)
        facts = np.empty((4, len(vectors)), np.float32)
        extra = np.stack([self.extra[:, 0], self.extra[:, 2 if are_queries else 1] * LIMIT]).astype(np.int32)
        arrays = (vectors, self.centre, self.step, self.reach, self.weight, extra, rows.numpy(), facts)
        kernels.run_by_rows(whole_kernels.round_vectors, np.arange(len(vectors) + 1), *arrays)
        return rows, facts


def _least_step(spread: NDArray[np.floating], width: int) -> float:
    """The least step with which coordinates of this spread need at most `width` columns."""
    most = SPAN * float(spread.max()) / LIMIT * 1.0001
    least = most / math.sqrt(width)
    for _ in range(40):
        middle = math.sqrt(least * most)
        if np.square(np.ceil(SPAN * spread / (LIMIT * middle))).sum() <= width:
            most = middle
        else:
            least = middle
    return most * 1.0001  # lest rounding adds a column


class Candidates:
    """Of each query (B, D), the entries that may be among its k nearest: `items` (B, C) uint64, the bits of a lower
    bound of half the distance, then an entry; `highest` (B, C), upper bounds; `counts` (B,), how many there are, -1 for
    queries given up; `limits` (B,), an upper bound of half the k-th distance."""

    def __init__(self, queries: NDArray[np.float32], columns: Columns, k: int) -> None:
        self.queries, self.columns, self.k = queries, columns, k
        self.rows, self.facts = columns.rounded(queries, are_queries=True)
        self.items = np.empty((len(queries), ROOM * k + 2048), np.uint64)
        self.highest = np.empty(self.items.shape, np.float32)
        self.met_odd = False  # whether keys were left out because they are not finite
        self.counts = np.where(self.facts[0] < LARGEST, 0, -1)
        self.limits = np.full(len(queries), LARGEST, np.float32)
        self.rounding = np.float32(2.0**-21 * (queries.shape[1] + 32))  # of sums of float32 numbers

    def offer(self, keys: NDArray[np.float32], start: int) -> bool:
        """Looks at keys (n, D), the first of which is entry `start`; False when this way of searching does not pay."""
        rows, facts = self.columns.rounded(keys, are_queries=False)
        odd = np.flatnonzero(~(facts[0] < LARGEST))
        if len(odd):
            self.met_odd = True
            if np.isfinite(keys[odd]).all(1).any():
                return False  # their distances might be finite
            facts[:, odd] = np.array([[np.inf], [0], [0], [0]])  # never found
        products = torch._int_mm(self.rows, rows.T).numpy()
        arrays = (products, self.facts, facts, self.columns.step, self.rounding, start, self.k)
        bounds = np.arange(len(products) + 1)
        kernels.run_by_rows(
            whole_kernels.offer_products, bounds, *arrays, self.items, self.counts, self.highest, self.limits
        )
        return int((self.counts < 0).sum()) * 8 <= len(self.counts)

    def result(self, keys: NDArray[np.floating]) -> NDArray[np.uint64]:
        """(B, C') items with distances in the place of bounds; the k least of a query are its nearest entries."""
        bounds, firsts = np.arange(len(self.counts) + 1), np.zeros(len(self.counts), np.int64)
        kernels.run_by_rows(
            whole_kernels.least_highest_first, bounds, self.items, self.highest, self.counts, self.k, firsts
        )
        self._measure(keys, np.zeros_like(firsts), firsts)
        kernels.run_by_rows(whole_kernels.within_furthest, bounds, self.items, firsts, self.counts, self.k)
        ends = np.maximum(self.counts, 0)
        self._measure(keys, firsts, ends)
        items = self.items[:, : max(self.k, int(ends.max(initial=0)))]
        items[np.arange(items.shape[1]) >= ends[:, None]] = NOTHING
        return items

    def _measure(self, keys: NDArray[np.floating], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Puts distances into the items begins[b] to ends[b] of query b, reading the keys in their order."""
        capacity = self.items.shape[1]
        pairs = np.concatenate([
            (line[begin:end] << SHIFT) | np.arange(number * capacity + begin, number * capacity + end, dtype=np.uint64)
            for number, (line, begin, end) in enumerate(zip(self.items, begins.tolist(), ends.tolist(), strict=True))
        ])
        pairs.sort()
        bounds = np.append(np.flatnonzero(np.diff(pairs >> SHIFT, prepend=NOTHING)), len(pairs))
        words = keys.view(np.uint16 if keys.itemsize == 2 else np.uint32)
        kernels.run_by_rows(whole_kernels.measure, bounds, pairs, self.queries, words, self.items)
