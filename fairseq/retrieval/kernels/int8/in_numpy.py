"""What the instructions and loops of int8 search compute, in NumPy: to be read beside them, and what the tests compare
them with. Arrays are given whole here, where the instructions are given addresses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairseq.retrieval.kernels.int8.layout import FOUR, TRANSFORM

Singles = NDArray[np.float32]


def multiply_tile(queries: NDArray[np.int8], keys: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(8, 48) products of queries [groups][8][4] and keys [3][groups][16][4]."""
    by_register = np.einsum("gqb,rgkb->qrk", queries.astype(np.int32), keys.astype(np.int32))
    return by_register.reshape(queries.shape[1], -1).astype(np.int32)


def near_columns(
    products: NDArray[np.int32], norms: Singles, numbers: tuple[float, float, float, float, int], start: int
) -> NDArray[np.int32]:
    """The columns, `start` and following, of products (48,) and norms (3, 48) that may be near enough."""
    rounded_norm, error, square_step, limit, shift = numbers
    half_square, key_error, key_norm = norms.astype(np.float64)
    least = half_square - rounded_norm * key_error - error * key_norm - square_step * (products - np.int64(shift))
    return np.flatnonzero(least <= limit).astype(np.int32) + np.int32(start)


def hadamard(numbers: Singles) -> Singles:
    """The Hadamard transform of the last axis, whose length is a power of two: H[i, j] = (-1)^popcount(i & j)."""
    length = 1
    while length < numbers.shape[-1]:
        pairs = numbers.reshape(*numbers.shape[:-1], -1, 2, length)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        numbers = np.stack([left + right, left - right], axis=-2).reshape(numbers.shape)
        length *= 2
    return numbers


def butterfly(rows: Singles) -> Singles:
    """The Hadamard transform, of length 4, of the columns of rows (4, n)."""
    return np.ascontiguousarray(hadamard(np.ascontiguousarray(rows.T)).T)


def scale_and_transform(vector: NDArray[np.floating], centre: Singles, scale: Singles) -> tuple[Singles, np.float32]:
    """The transforms of groups of 64 of (vector - centre) * scale, and the sum of (vector - centre)^2."""
    difference = vector.astype(np.float32) - centre
    transformed = hadamard((difference * scale).reshape(-1, TRANSFORM)).reshape(-1)
    return transformed, np.square(difference).sum()


def round_to_bytes(numbers: Singles, limits: tuple[np.float32, ...]) -> tuple[NDArray[np.uint8], np.float32]:
    """The nearest bytes to numbers + zero, clipped; and the sum of the squared differences from them."""
    zero, least, largest = limits
    shifted = numbers + zero
    clipped = np.where(shifted > least, np.minimum(shifted, largest), least)  # `least` for NaN
    rounded = np.floor(clipped + np.float32(0.5))
    return rounded.astype(np.uint8), np.square(shifted - rounded).sum()


def transpose_16(rows: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Of a matrix (16, 16)."""
    return np.ascontiguousarray(rows.T)


def squared_distance(this: Singles, that: NDArray[np.floating]) -> np.float32:
    """The squared L2 distance in float32."""
    return np.square(this - that.astype(np.float32)).sum()


def rotate(vectors: NDArray[np.floating], centre: Singles, scale: Singles, second_scale: Singles) -> Singles:
    """(n, W): vectors (n, D) less the centre, rotated, in steps: what `round_vectors` rounds."""
    width, span = len(scale), len(second_scale)
    rotated = np.zeros((len(vectors), width), np.float32)
    rotated[:, : vectors.shape[1]] = (vectors.astype(np.float32) - centre) * scale[: vectors.shape[1]]
    rotated[:, :span] = hadamard(rotated[:, :span])
    if span < width:
        rotated[:, -span:] = hadamard(rotated[:, -span:] * second_scale)
    return rotated


def tiled(numbers: NDArray[np.uint8], tile: int) -> NDArray[np.uint32]:
    """Bytes (n, W) as tiles (ceil(n / tile), W / 4, tile) of four bytes each; the last is filled up with zeros."""
    count, width = numbers.shape
    padded = np.zeros((-(-count // tile) * tile, width), np.uint8)
    padded[:count] = numbers
    words = padded.view(np.uint32).reshape(-1, tile, width // FOUR)
    return np.ascontiguousarray(words.swapaxes(1, 2))
