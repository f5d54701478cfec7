"""Products of whole numbers for the exact index (`exact`), where the processor multiplies 8 bit numbers fast: they cost
a quarter of float32 ones.

Vectors are rotated and rounded to multiples of one step. The rotation, by random signs and Hadamard transforms, changes
no product, and makes coordinates about equally wide, so that one step fits all. Nothing is assumed of how well that
fits: what rounding and clipping took from each vector is measured, and bounds the error of a product,

    |<q, x> - <q', x'>| = |<q - q', x> + <q', x - x'>| <= |q - q'| |x| + |q'| |x - x'|    (Cauchy and Schwarz).

Measured are the numbers that the rotation gave in float32. It is off by a few roundings of |x| for each of its log2(W)
stages, so a product by fewer than W roundings of (|q|^2 + |x|^2) / 2; eight times W + 32 of them are allowed for.

Distances are computed of entries that may be nearer than the k-th found so far. As long as few were seen, that would be
most, so a sample of the keys first says how far the k-th is likely to be. Where that proves too near, fewer than k are
found, and the query is searched again in another way."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import intrinsics
from fairseq.retrieval.kernels.int8 import int8_kernels

SPAN = 4.0  # standard deviations that a coordinate's numbers cover; what lies beyond is clipped
CAUTION = 4.0  # standard deviations by which the k-th entry is expected to be farther than in the sample
WIDEST = 1 << 16  # coordinates, of whose products sums of 32 bits are sure to hold


def is_fast() -> bool:
    """Whether the processor multiplies 8 bit numbers into sums of 32 bits, fast and without saturation, and reads
    halves."""
    return intrinsics.MULTIPLIES and intrinsics.READS_HALVES


class Rounded(NamedTuple):
    """Vectors x as they enter the product, x'.

    rows: (tiles, W / 4, T) uint32, see `int8_kernels.round_vectors`; of queries, numbers have signs. facts: (3, n)
    float32, half the squared norm of x; the norm of x - x'; of queries, that of x'. shifts: (n,), by how much the sums
    of products with a query are too large, since what is stored of a key is."""

    rows: NDArray[np.uint32]
    facts: NDArray[np.float32]
    shifts: NDArray[np.int32]


class Rounding:
    """How vectors become rows of W numbers of 8 bits, W a multiple of 64: fitted to some of the keys (n, D).

    Transforms are of P numbers, a power of two: the first P and then, if there are more, the last P."""

    def __init__(self, some: NDArray[np.float32], centre: NDArray[np.float32]) -> None:
        self.width = -(-max(some.shape[1], 1) // 64) * 64
        span = 1 << (self.width.bit_length() - 1)  # the largest power of two
        spread = math.sqrt(np.square(some - centre, dtype=np.float64).sum() / max(1, len(some)) / self.width)
        self.centre, self.step = centre, np.float32(max(spread, 1e-30) * SPAN / int8_kernels.MOST)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, self.width))
        signs[:, :span] = signs[:, :span] / math.sqrt(span)
        self.scale = np.asarray(signs[0] / self.step, np.float32)
        self.again = np.asarray(signs[1, :span], np.float32)

    @property
    def how(self) -> tuple[Any, ...]:
        """What `int8_kernels.round_vectors` needs to know."""
        return self.centre, self.scale, self.again, self.step

    def rounded(self, vectors: NDArray[Any], are_queries: bool) -> Rounded:
        """Vectors (n, D), float32 or the uint16 bits of halves, as rows to multiply."""
        tile = intrinsics.TILE_ROWS if are_queries else intrinsics.VECTOR
        room = -(-len(vectors) // intrinsics.TILE_COLUMNS) * intrinsics.TILE_COLUMNS
        rows = np.zeros((room // tile, self.width // 4, tile), np.uint32)
        facts = np.zeros((3, len(vectors)), np.float32)
        shifts = np.zeros(len(vectors), np.int32)
        bounds = np.arange(-(-len(vectors) // tile) + 1)
        kernels.run_by_rows(int8_kernels.round_vectors, bounds, vectors, *self.how, rows, facts)
        if are_queries:
            numbers = rows.view(np.uint8).reshape(*rows.shape, 4)
            numbers ^= int8_kernels.MIDDLE  # with a sign
            numbers = numbers.view(np.int8).swapaxes(1, 2).reshape(room, -1)[: len(vectors)].astype(np.int32)
            shifts[:] = numbers.sum(1) * int8_kernels.MIDDLE
            facts[2] = np.sqrt(np.square(numbers).sum(1)) * self.step
        return Rounded(rows, facts, shifts)


def estimates(asked: Rounded, known: Rounded, step: float) -> NDArray[np.float32]:
    """(B, n): about half the squared distances of queries to keys, less half the squared norms of the queries."""
    out = np.empty((asked.facts.shape[1], known.facts.shape[1]), np.float32)
    arrays = (asked.rows, asked.shifts, known.rows, known.facts[0], np.float32(step) ** 2, out)
    kernels.run_by_rows(int8_kernels.estimate, np.arange(-(-len(out) // intrinsics.TILE_ROWS) + 1), *arrays)
    return out


def likely_furthest(asked: Rounded, sample: Rounded, step: float, share: float) -> NDArray[np.int64]:
    """(B,): of the sample, the vector that for each query is likely farther than that share of what was sampled; empty
    where the sample is too small to tell."""
    size = sample.facts.shape[1]
    expected = share * size
    place = int(expected + CAUTION * (math.sqrt(expected) + 1))
    if place >= size:
        return np.zeros(0, np.int64)
    far = estimates(asked, sample, step)
    return (far == np.partition(far, place, axis=1)[:, place, None]).argmax(1)
