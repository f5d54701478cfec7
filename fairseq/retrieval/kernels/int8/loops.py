"""Compiled loops of int8 search. They need numba, as all of `kernels` does; `in_numpy` says what each computes."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import compiled
from fairseq.retrieval.kernels.exact_kernels import keep_smallest
from fairseq.retrieval.kernels.int8.layout import (
    CLIP,
    ERROR,
    FOUR,
    HALF_SQUARE,
    LANES,
    NORM,
    TILE_KEYS,
    TILE_QUERIES,
    TRANSFORM,
)

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.int8.instructions import (
        butterfly,
        hadamard_64,
        multiply_tile,
        near_columns,
        round_to_bytes,
        scale_and_transform,
        squared_distance,
        transpose_16,
    )
    from fairseq.retrieval.kernels.intrinsics import as_single

LARGEST = np.float32(1e36)  # sum of squares that float32 holds safely


@compiled
def round_vectors(
    first_tile: int,
    last_tile: int,
    bounds: np.ndarray,
    vectors: np.ndarray,
    centre: np.ndarray,
    scale: np.ndarray,
    second_scale: np.ndarray,
    step: float,
    tiles: np.ndarray,
    norms: np.ndarray,
) -> None:
    """Rotates vectors (n, D), float32 or bits of float16, less the centre (D,), and rounds them to multiples of the
    step, for a range of tiles of T vectors.

    scale (W,): factors before the first transform, whose results are in steps; second_scale (P,): before the second,
    which there is if P < W; tiles (tiles, W / 4, T) uint32: four bytes each, which are numbers plus 128, of vector n at
    [n // T, :, n % T]; norms (2 or 3, n): half the squared norm, and the norm of the rounding error. Vectors that are
    not finite, or very large, have half a squared norm of NaN, and an error of -1 if they are finite."""
    dimension, width, span, tile = vectors.shape[1], len(scale), len(second_scale), tiles.shape[2]
    numbers = np.zeros(width, np.float32)
    words = np.zeros((tile, width // FOUR), np.uint32)
    first_vector, vector_bytes = vectors.ctypes.data, vectors.strides[0]
    first_number, first_word, word_bytes = numbers.ctypes.data, words.ctypes.data, words.strides[0]
    first_out, out_bytes = tiles.ctypes.data, tiles.strides[0]
    groups = min(dimension, span) // TRANSFORM
    last_row = min(last_tile * tile, len(vectors))
    for row in range(first_tile * tile, last_row):
        vector = vectors[row]
        address = first_vector + row * vector_bytes
        square = scale_and_transform(address, centre.ctypes.data, scale.ctypes.data, groups, first_number, vector[0])
        for d in range(TRANSFORM * groups, dimension):
            value = as_single(vector[d]) - centre[d]
            numbers[d] = value * scale[d]
            square += value * value
        numbers[dimension:] = 0
        hadamard(numbers[:span], TRANSFORM * groups)
        if span < width:
            rest = numbers[width - span :]
            for d in range(span):
                rest[d] *= second_scale[d]
            hadamard(rest, 0)
        error = round_to_bytes(first_number, width // LANES, CLIP, first_word + row % tile * word_bytes)
        if row % tile == tile - 1 or row == last_row - 1:
            out = tiles[row // tile]
            if tile == LANES:
                for group in range(0, width // FOUR, LANES):
                    target = first_out + row // tile * out_bytes + 4 * LANES * group
                    transpose_16(first_word + 4 * group, word_bytes, target)
            else:
                for group in range(width // FOUR):
                    for place in range(tile):
                        out[group, place] = words[place, group]
        norms[HALF_SQUARE, row], norms[ERROR, row] = square * np.float32(0.5), math.sqrt(error) * step
        if not (square < LARGEST and error < LARGEST):
            finite = True
            for d in range(dimension):
                finite &= np.isfinite(as_single(vector[d]))
            norms[HALF_SQUARE, row], norms[ERROR, row] = np.nan, -1 if finite else np.nan


@compiled
def hadamard(numbers: np.ndarray, done: int) -> None:
    """The Hadamard transform, not normalised and in place, of 64, 128, 256 ... numbers, of which the first `done` are
    transformed in groups of 64 already."""
    address = numbers.ctypes.data
    for start in range(done, len(numbers), TRANSFORM):
        hadamard_64(address + 4 * start)
    length = TRANSFORM
    while 4 * length <= len(numbers):
        for start in range(0, len(numbers), 4 * length):
            for place in range(start, start + length, LANES):
                butterfly(address + 4 * place, 4 * length)
        length *= 4
    if length < len(numbers):
        left, right = numbers[:length], numbers[length:]
        for place in range(length):
            left[place], right[place] = left[place] + right[place], left[place] - right[place]


@compiled
def estimate(
    first_tile: int,
    last_tile: int,
    bounds: np.ndarray,
    query_tiles: np.ndarray,
    shifts: np.ndarray,
    key_tiles: np.ndarray,
    half_squares: np.ndarray,
    square_step: float,
    out: np.ndarray,
) -> None:
    """out (B, n): half the squared norms (n,) of keys less the scalar products of rounded queries and keys, for a range
    of tiles of queries."""
    products = np.empty((TILE_QUERIES, TILE_KEYS), np.int32)
    many, size = out.shape
    first_query, first_key, to_products = query_tiles.ctypes.data, key_tiles.ctypes.data, products.ctypes.data
    for first in range(0, size, TILE_KEYS):  # these keys stay in the cache for all queries
        keys = first_key + first // LANES * key_tiles.strides[0]
        base = half_squares[first : first + TILE_KEYS]
        for tile in range(first_tile, last_tile):
            start = tile * TILE_QUERIES
            multiply_tile(first_query + tile * query_tiles.strides[0], keys, key_tiles.shape[1], to_products)
            for place in range(min(TILE_QUERIES, many - start)):
                line, values, shift = products[place], out[start + place, first:], shifts[start + place]
                for column in range(len(base)):
                    values[column] = base[column] - square_step * np.float32(np.int32(line[column] - shift))


@compiled
def offer_keys(
    first_key: int,
    last_key: int,
    keys: np.ndarray,
    centre: np.ndarray,
    scale: np.ndarray,
    second_scale: np.ndarray,
    step: float,
    query_tiles: np.ndarray,
    query_norms: np.ndarray,
    shifts: np.ndarray,
    sum_error: float,
    block: int,
    queries: np.ndarray,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> tuple[int, int]:
    """Offers a range of keys to all queries, a block at a time, as `exact_kernels.offer_block` does.

    keys (N, D) float32 or bits of float16; centre to step: see `round_vectors`; query_tiles, query_norms, shifts: see
    `rounding.Rounded`; sum_error: relative error of sums in float32; queries (B, D); items (B, C >= k + block), counts
    and furthest: see `nearest_items`. Returns how many keys could not be rounded, and how many of these are finite."""
    capacity = -(-block // TILE_KEYS) * TILE_KEYS
    words = capacity * len(scale) // FOUR
    memory = np.empty(words + LANES, np.uint32)
    skipped = -memory.ctypes.data // 4 % LANES  # so that no vector lies in two cache lines
    tiles = memory[skipped : skipped + words].reshape(capacity // LANES, len(scale) // FOUR, LANES)
    norms = np.empty((3, capacity), np.float32)
    products = np.empty((TILE_QUERIES, TILE_KEYS), np.int32)
    bounds = np.empty(0, np.int64)
    unrounded = huge = 0
    for start in range(first_key, last_key, block):
        some = keys[start : min(start + block, last_key)]
        norms[HALF_SQUARE, len(some) :] = np.nan
        round_vectors(0, -(-len(some) // LANES), bounds, some, centre, scale, second_scale, step, tiles, norms)
        for key in range(len(some)):
            if np.isnan(norms[HALF_SQUARE, key]):
                unrounded += 1
                huge += int(norms[ERROR, key] < 0)
        arrays = (query_tiles, query_norms, shifts)
        offer_block(some, start, tiles, norms, products, step, *arrays, sum_error, queries, k, items, counts, furthest)
    return unrounded, huge


@compiled
def offer_block(
    keys: np.ndarray,
    start: int,
    key_tiles: np.ndarray,
    key_norms: np.ndarray,
    products: np.ndarray,
    step: float,
    query_tiles: np.ndarray,
    query_norms: np.ndarray,
    shifts: np.ndarray,
    sum_error: float,
    queries: np.ndarray,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> None:
    """Offers keys (n, D), the first of which is entry `start`, to all queries. key_tiles, key_norms (3, C >= n): of the
    keys, as `round_vectors` leaves them, in whole tiles; their norms are overwritten. products: memory for a tile's.

    Arrays of which only the address is used must come from the caller: the compiler would free those made here."""
    capacity, groups, many = items.shape[1], key_tiles.shape[1], len(queries)
    transforms = queries.shape[1] // TRANSFORM
    first_key, key_bytes, tile_bytes = keys.ctypes.data, keys.strides[0], key_tiles.strides[0]
    first_query, query_bytes, first_tile = query_tiles.ctypes.data, query_tiles.strides[0], key_tiles.ctypes.data
    first_norm, norm_bytes, to_products = key_norms.ctypes.data, key_norms.strides[0], products.ctypes.data
    square_step = np.float32(step * step)
    candidates = np.empty((TILE_QUERIES, len(keys) + LANES), np.int32)
    first_candidate, candidate_bytes = candidates.ctypes.data, candidates.strides[0]
    found = np.empty(TILE_QUERIES, np.int64)
    distances = np.empty(len(keys) + 1, np.float32)
    bits = distances.view(np.uint32)
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    key_norms[NORM] = np.sqrt(np.float32(2) * key_norms[HALF_SQUARE])
    key_norms[HALF_SQUARE] *= np.float32(1) - np.float32(sum_error)
    errors, rounded_norms = np.float32(1.01) * query_norms[ERROR], np.float32(1.01) * query_norms[NORM]
    limits = np.empty(TILE_QUERIES, np.float32)
    for tile in range(-(-many // TILE_QUERIES)):
        first_row = tile * TILE_QUERIES
        last_row = min(first_row + TILE_QUERIES, many)
        found[:] = 0
        for row in range(first_row, last_row):  # a little more than half, since distances are rounded too
            own = query_norms[HALF_SQUARE, row] * np.float32(1 - sum_error)
            limits[row - first_row] = furthest[row] * np.float32(0.5001) - own
        for first in range(0, len(keys), TILE_KEYS):
            tile_at = first_tile + first // LANES * tile_bytes
            multiply_tile(first_query + tile * query_bytes, tile_at, groups, to_products)
            for row in range(first_row, last_row):
                place = row - first_row
                numbers = (rounded_norms[row], errors[row], square_step, limits[place], shifts[row])
                line, norms_at = to_products + 4 * TILE_KEYS * place, first_norm + 4 * first
                out = first_candidate + place * candidate_bytes + 4 * found[place]
                found[place] += near_columns(line, norms_at, norm_bytes, numbers, np.int32(first), out)
        for row in range(first_row, last_row):
            own_items, count, query = items[row], counts[row], queries[row]
            those, number = candidates[row - first_row], found[row - first_row]
            for place in range(number):
                key = those[place]
                address = first_key + key * key_bytes
                distance = squared_distance(query.ctypes.data, address, transforms, keys[key, 0])
                for d in range(TRANSFORM * transforms, len(query)):
                    difference = query[d] - as_single(keys[key, d])
                    distance += difference * difference
                distances[place] = distance
            if count + number > capacity:
                keep_smallest(own_items, count, k)
                count = k
                word[0] = np.uint32(own_items[k - 1] >> np.uint64(32))
                furthest[row] = one[0]
            least = furthest[row]
            for place in range(number):
                own_items[count] = (np.uint64(bits[place]) << np.uint64(32)) | np.uint64(start + those[place])
                count += int(distances[place] < least)
            counts[row] = count
