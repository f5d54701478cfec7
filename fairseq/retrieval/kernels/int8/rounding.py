"""Vectors rotated and rounded to int8, and estimates of distances from them. docs/int8.md gives the
mathematics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels.int8 import loops
from fairseq.retrieval.kernels.int8.layout import (
    FOUR,
    HALF_SQUARE,
    LANES,
    NORM,
    STEPS,
    TILE_KEYS,
    TILE_QUERIES,
    TRANSFORM,
    ZERO,
)

SPAN = 4.0  # standard deviations of a coordinate that int8 covers; what lies beyond is clipped
CAUTION = 4.0  # standard deviations by which the k-th entry is expected to be farther than in the sample


class Rounded(NamedTuple):
    """Rounded vectors x' of vectors x.

    tiles: (tiles, W / 4, T) uint32, see `loops.round_vectors`; of queries, the bytes are int8. norms: (3, n) float32,
    half the squared norm of x; the norm of x - x'; of queries, that of x'. shifts: (n,) int32, by how much the sums of
    a query's products are too large, because the bytes of keys are."""

    tiles: NDArray[np.uint32]
    norms: NDArray[np.float32]
    shifts: NDArray[np.int32]


class Rounding:
    """How vectors become rows of W int8 numbers, W a multiple of 64: fitted to a sample of the keys (n, D).

    Transforms are of P numbers, P the largest power of two up to W: of the first P and then, if P < W, of the last."""

    def __init__(self, sample: NDArray[np.float32], centre: NDArray[np.float32]) -> None:
        self.width = -(-max(sample.shape[1], 1) // TRANSFORM) * TRANSFORM
        span = 1 << (self.width.bit_length() - 1)
        spread = math.sqrt(np.square(sample - centre, dtype=np.float64).sum() / max(1, len(sample)) / self.width)
        self.centre, self.step = centre, np.float32(max(spread, 1e-30) * SPAN / STEPS)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, self.width))
        signs[:, :span] = signs[:, :span] / math.sqrt(span)
        self.scale = np.asarray(signs[0] / self.step, np.float32)
        self.second_scale = np.asarray(signs[1, :span], np.float32)

    @property
    def parameters(self) -> tuple[Any, ...]:
        """What `loops.round_vectors` needs to know."""
        return self.centre, self.scale, self.second_scale, self.step

    def rounded(self, vectors: NDArray[Any], are_queries: bool) -> Rounded:
        """Vectors (n, D), float32 or the uint16 bits of float16, as tiles to multiply."""
        tile = TILE_QUERIES if are_queries else LANES
        capacity = -(-len(vectors) // TILE_KEYS) * TILE_KEYS
        tiles = np.zeros((capacity // tile, self.width // FOUR, tile), np.uint32)
        norms = np.zeros((3, len(vectors)), np.float32)
        shifts = np.zeros(len(vectors), np.int32)
        bounds = np.arange(-(-len(vectors) // tile) + 1)
        kernels.run_by_rows(loops.round_vectors, bounds, vectors, *self.parameters, tiles, norms)
        if are_queries:
            numbers = tiles.view(np.uint8).reshape(*tiles.shape, FOUR)
            numbers ^= ZERO  # subtracts 128 and makes the byte signed
            signed = numbers.view(np.int8).swapaxes(1, 2).reshape(capacity, -1)[: len(vectors)].astype(np.int32)
            shifts[:] = signed.sum(1) * ZERO
            norms[NORM] = np.sqrt(np.square(signed).sum(1)) * self.step
        return Rounded(tiles, norms, shifts)


def estimates(queries: Rounded, keys: Rounded, step: float) -> NDArray[np.float32]:
    """(B, n): about half the squared distances of queries to keys, less half the squared norms of the queries."""
    out = np.empty((queries.norms.shape[1], keys.norms.shape[1]), np.float32)
    arrays = (queries.tiles, queries.shifts, keys.tiles, keys.norms[HALF_SQUARE], np.float32(step) ** 2, out)
    kernels.run_by_rows(loops.estimate, np.arange(-(-len(out) // TILE_QUERIES) + 1), *arrays)
    return out


def likely_furthest(queries: Rounded, sample: Rounded, step: float, share: float) -> NDArray[np.int64]:
    """(B,): for each query the vector of the sample that is likely farther than that share of all keys; empty where the
    sample is too small to tell."""
    size = sample.norms.shape[1]
    expected = share * size
    place = int(expected + CAUTION * (math.sqrt(expected) + 1))
    if place >= size:
        return np.zeros(0, np.int64)
    far = estimates(queries, sample, step)
    return (far == np.partition(far, place, axis=1)[:, place, None]).argmax(1)
