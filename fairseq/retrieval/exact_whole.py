"""Products of whole numbers for the exact index (`exact`), where the processor multiplies 8 bit numbers fast: they cost
a quarter of float32 ones.

Vectors are rounded to multiples of one step. A coordinate that needs more than 8 bits is cut into several columns, each
of at most 127 steps, so wide coordinates cost more columns, and the step may be small for all. Nothing is assumed of
how well that fits: what rounding and clipping took from each vector is measured, and bounds the error of a product,

    |<q, x> - <q', x'>| <= |(q - q') / w| |x w| + |q' w| |(x - x') / w|    for any weights w (Cauchy and Schwarz).

Distances are computed of entries that may be nearer than the k-th found so far. As long as few were seen, that would be
most, so a sample of the keys first says how far the k-th is likely to be. Where that proves too near, fewer than k are
found, and the query is searched again in another way."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import instructions, kernels, whole_kernels

EXTRA = 0.0625  # columns added for coordinates that need more than one
SPAN = 4.0  # standard deviations that columns cover; what lies beyond is clipped
LIMIT = 127  # steps that a column holds
LARGEST = 1e36  # squared norm that float32 sums hold safely
BLOCK = 1024  # most keys looked at together, for each of which a product with each query is kept
CAUTION = 4.0  # standard deviations by which the k-th entry is expected to be farther than in the sample


def is_fast() -> bool:
    """Whether the processor multiplies 8 bit numbers into sums of 32 bits, fast and without saturation, and reads
    halves."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    multiplies = hasattr(torch, "_int_mm") and bool(known.get("avx512_vnni") or known.get("amx_int8"))
    return multiplies and instructions.READS_HALVES


class Rounded(NamedTuple):
    """Vectors as they enter the product: rows (n, W) int8; facts (4, n): half the squared norm; the norm of x w; that
    of what rounding took, over w; that of x' w."""

    rows: Tensor
    facts: NDArray[np.float32]


class Columns:
    """How vectors become rows of 8 bit numbers, chosen from some of the keys (n, D)."""

    def __init__(self, some: NDArray[np.float32], centre: NDArray[np.float32]) -> None:
        dimension = some.shape[1]
        spread = np.square(some - centre, dtype=np.float64).mean(0) ** 0.5 if len(some) else np.ones(dimension)
        spread = np.maximum(spread, max(1e-6 * float(spread.max(initial=0)), 1e-30))
        width = max(-(-round(dimension * (1 + EXTRA)) // 32) * 32, dimension)
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
        coordinates, key_parts, query_parts = np.array(several, np.int32).reshape(-1, 3).T
        self.extra = [np.stack([coordinates, parts * LIMIT]) for parts in (key_parts, query_parts)]  # of keys, queries
        self.width = max(width, dimension + len(several))

    def rounded(self, vectors: NDArray[Any], are_queries: bool, rows: Tensor | None = None) -> Rounded:
        """Vectors (n, D), float32 or the uint16 bits of halves, as rows to multiply; written into `rows`, if given."""
        if rows is None:
            rows = torch.zeros(len(vectors), self.width, dtype=torch.int8)
        facts = np.empty((4, len(vectors)), np.float32)
        how = (self.centre, self.step, self.reach, self.weight, self.extra[are_queries])
        bounds = np.arange(len(vectors) + 1)
        kernels.run_by_rows(whole_kernels.round_vectors, bounds, vectors, *how, rows.numpy(), facts)
        return Rounded(rows, facts)


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


def likely_furthest(asked: Rounded, sample: Rounded, step: float, share: float) -> NDArray[np.int64]:
    """(B,): of the sample, the vector that for each query is likely farther than that share of what was sampled; empty
    where the sample is too small to tell."""
    expected = share * len(sample.rows)
    place = int(expected + CAUTION * (math.sqrt(expected) + 1))
    if place >= len(sample.rows):
        return np.zeros(0, np.int64)
    products = torch._int_mm(asked.rows, sample.rows.T).float()
    estimates = products.mul_(-(step**2)).add_(torch.from_numpy(sample.facts[0])).numpy()
    return (estimates == np.partition(estimates, place, axis=1)[:, place, None]).argmax(1)
