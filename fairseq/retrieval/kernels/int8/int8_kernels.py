"""Compiled loops of the exact search's pass over whole numbers (`exact_whole`). They need numba, as `kernels` does."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import compiled
from fairseq.retrieval.kernels.exact_kernels import keep_smallest

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.intrinsics import (
        TILE_COLUMNS,
        TILE_ROWS,
        VECTOR,
        as_single,
        mix_64,
        mix_four,
        multiply_tile,
        near_columns,
        round_numbers,
        scale_and_mix,
        squares_apart,
        transpose_16,
    )

MOST = 127  # steps that a number of 8 bits holds
MIDDLE = 128  # what stands for 0 where numbers have no sign
ZERO, LOW, HIGH = np.float32(MIDDLE), np.float32(MIDDLE - MOST), np.float32(MIDDLE + MOST)  # what is beyond is clipped
LARGEST = np.float32(1e36)  # sum of squares that float32 holds safely


@compiled
def round_vectors(
    first_tile: int,
    last_tile: int,
    bounds: np.ndarray,
    vectors: np.ndarray,
    centre: np.ndarray,
    scale: np.ndarray,
    again: np.ndarray,
    step: float,
    rows: np.ndarray,
    facts: np.ndarray,
) -> None:
    """Rotates vectors (n, D), float32 or bits of halves, less the centre (D,), and rounds them to steps, for a range of
    tiles of T vectors.

    scale (W,): factors before the first transform, whose results are in steps; again (P,): before the second, which
    there is if P < W; rows (tiles, W / 4, T) uint32: four numbers a word, each more by 128, of vector n at
    [n // T, :, n % T]; facts (2, n): half the squared norm, and the norm of what rounding took. Vectors that are not
    finite, or very large, have facts that are NaN, and -1 if they are finite."""
    dimension, width, span, tile = vectors.shape[1], len(scale), len(again), rows.shape[2]
    numbers = np.zeros(width, np.float32)
    words = np.zeros((tile, width // 4), np.uint32)
    first_vector, vector_bytes = vectors.ctypes.data, vectors.strides[0]
    first_number, first_word, word_bytes = numbers.ctypes.data, words.ctypes.data, words.strides[0]
    first_out, out_bytes = rows.ctypes.data, rows.strides[0]
    groups = min(dimension, span) // 64
    last_row = min(last_tile * tile, len(vectors))
    for row in range(first_tile * tile, last_row):
        vector = vectors[row]
        known = first_vector + row * vector_bytes
        norm = scale_and_mix(known, centre.ctypes.data, scale.ctypes.data, groups, first_number, vector[0])
        for d in range(64 * groups, dimension):
            value = as_single(vector[d]) - centre[d]
            numbers[d] = value * scale[d]
            norm += value * value
        numbers[dimension:] = 0
        mix(numbers[:span], 64 * groups)
        if span < width:
            rest = numbers[width - span :]
            for d in range(span):
                rest[d] *= again[d]
            mix(rest, 0)
        lost = round_numbers(first_number, width // 16, (ZERO, LOW, HIGH), first_word + row % tile * word_bytes)
        if row % tile == tile - 1 or row == last_row - 1:
            out = rows[row // tile]
            if tile == VECTOR:
                for group in range(0, width // 4, VECTOR):
                    address = first_out + row // tile * out_bytes + 4 * VECTOR * group
                    transpose_16(first_word + 4 * group, word_bytes, address)
            else:
                for group in range(width // 4):
                    for place in range(tile):
                        out[group, place] = words[place, group]
        facts[0, row], facts[1, row] = norm * np.float32(0.5), math.sqrt(lost) * step
        if not (norm < LARGEST and lost < LARGEST):
            finite = True
            for d in range(dimension):
                finite &= np.isfinite(as_single(vector[d]))
            facts[0, row], facts[1, row] = np.nan, -1 if finite else np.nan


@compiled
def mix(numbers: np.ndarray, done: int) -> None:
    """The Hadamard transform, not normalised and in place, of 64, 128, 256 ... numbers, of which the first `done` are
    transformed by 64 already."""
    address = numbers.ctypes.data
    for start in range(done, len(numbers), 64):
        mix_64(address + 4 * start)
    apart = 64
    while 4 * apart <= len(numbers):
        for start in range(0, len(numbers), 4 * apart):
            for place in range(start, start + apart, 16):
                mix_four(address + 4 * place, 4 * apart)
        apart *= 4
    if apart < len(numbers):
        left, right = numbers[:apart], numbers[apart:]
        for place in range(apart):
            left[place], right[place] = left[place] + right[place], left[place] - right[place]


@compiled
def estimate(
    first_tile: int,
    last_tile: int,
    bounds: np.ndarray,
    asked: np.ndarray,
    shifts: np.ndarray,
    known: np.ndarray,
    norms: np.ndarray,
    scale: float,
    out: np.ndarray,
) -> None:
    """out (B, n): half the squared norms (n,) of keys less their products with queries, for a range of tiles of
    queries; scale: the step squared."""
    products = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32)
    many, size = out.shape
    first_asked, first_known, of_products = asked.ctypes.data, known.ctypes.data, products.ctypes.data
    for first in range(0, size, TILE_COLUMNS):  # these keys stay in the cache for all queries
        address = first_known + first // VECTOR * known.strides[0]
        base = norms[first : first + TILE_COLUMNS]
        for asking in range(first_tile, last_tile):
            start = asking * TILE_ROWS
            multiply_tile(first_asked + asking * asked.strides[0], address, known.shape[1], of_products)
            for place in range(min(TILE_ROWS, many - start)):
                line, values, shift = products[place], out[start + place, first:], shifts[start + place]
                for column in range(len(base)):
                    values[column] = base[column] - scale * np.float32(np.int32(line[column] - shift))


@compiled
def offer_keys(
    first_key: int,
    last_key: int,
    keys: np.ndarray,
    centre: np.ndarray,
    scale: np.ndarray,
    again: np.ndarray,
    step: float,
    asked: np.ndarray,
    facts: np.ndarray,
    shifts: np.ndarray,
    rounding: float,
    block: int,
    queries: np.ndarray,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> tuple[int, int]:
    """Offers a range of keys to all queries, a block at a time, as `exact_kernels.offer_block` does.

    keys (N, D) float32 or bits of halves; asked, facts and shifts: of queries, as `rounding.Rounded`; rounding: of
    sums of float32 numbers; queries (B, D); items (B, C >= k + block). Returns how many keys could not be rounded, and
    how many of these are finite."""
    room = -(-block // TILE_COLUMNS) * TILE_COLUMNS
    words = room * len(scale) // 4
    somewhere = np.empty(words + VECTOR, np.uint32)
    skipped = -somewhere.ctypes.data // 4 % VECTOR  # so that a vector lies in one line of the cache
    rows = somewhere[skipped : skipped + words].reshape(room // VECTOR, len(scale) // 4, VECTOR)
    known = np.empty((3, room), np.float32)
    products = np.empty((TILE_ROWS, TILE_COLUMNS), np.int32)
    bounds = np.empty(0, np.int64)
    strange = huge = 0
    for start in range(first_key, last_key, block):
        some = keys[start : min(start + block, last_key)]
        known[0, len(some) :] = np.nan
        round_vectors(0, -(-len(some) // VECTOR), bounds, some, centre, scale, again, step, rows, known)
        for key in range(len(some)):
            if np.isnan(known[0, key]):
                strange += 1
                huge += int(known[1, key] < 0)
        arrays = (asked, facts, shifts)
        offer_block(some, start, rows, known, products, step, *arrays, rounding, queries, k, items, counts, furthest)
    return strange, huge


@compiled
def offer_block(
    keys: np.ndarray,
    start: int,
    rows: np.ndarray,
    known: np.ndarray,
    products: np.ndarray,
    step: float,
    asked: np.ndarray,
    facts: np.ndarray,
    shifts: np.ndarray,
    rounding: float,
    queries: np.ndarray,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> None:
    """Offers keys (n, D), the first of which is entry `start`, to all queries; rows, known (3, C >= n): the keys, as
    `round_vectors` leaves them, in whole tiles; products: room for a tile's.

    Arrays of which only the address is used must come from the caller: the compiler would free those made here."""
    capacity, groups, many, fours = items.shape[1], rows.shape[1], len(queries), queries.shape[1] // 64
    first_key, key_bytes, tile_bytes = keys.ctypes.data, keys.strides[0], rows.strides[0]
    first_asked, asked_bytes, first_tile = asked.ctypes.data, asked.strides[0], rows.ctypes.data
    first_fact, fact_bytes, of_products = known.ctypes.data, known.strides[0], products.ctypes.data
    scale = np.float32(step * step)
    chosen = np.empty((TILE_ROWS, len(keys) + VECTOR), np.int32)
    first_chosen, chosen_bytes = chosen.ctypes.data, chosen.strides[0]
    found = np.empty(TILE_ROWS, np.int64)
    distances = np.empty(len(keys) + 1, np.float32)
    bits = distances.view(np.uint32)
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    known[2] = np.sqrt(np.float32(2) * known[0])  # the norm
    known[0] *= np.float32(1) - np.float32(rounding)
    lost, held = np.float32(1.01) * facts[1], np.float32(1.01) * facts[2]
    limits = np.empty(TILE_ROWS, np.float32)
    for asking in range(-(-many // TILE_ROWS)):
        first_row = asking * TILE_ROWS
        last_row = min(first_row + TILE_ROWS, many)
        found[:] = 0
        for row in range(first_row, last_row):  # a little more than half, for rounding
            limits[row - first_row] = furthest[row] * np.float32(0.5001) - facts[0, row] * np.float32(1 - rounding)
        for first in range(0, len(keys), TILE_COLUMNS):
            some_rows = first_tile + first // VECTOR * tile_bytes
            multiply_tile(first_asked + asking * asked_bytes, some_rows, groups, of_products)
            for row in range(first_row, last_row):
                place = row - first_row
                numbers = (held[row], lost[row], scale, limits[place], shifts[row])
                address, known_at = of_products + 4 * TILE_COLUMNS * place, first_fact + 4 * first
                out = first_chosen + place * chosen_bytes + 4 * found[place]
                found[place] += near_columns(address, known_at, fact_bytes, numbers, np.int32(first), out)
        for row in range(first_row, last_row):
            mine, count, query = items[row], counts[row], queries[row]
            those, number = chosen[row - first_row], found[row - first_row]
            for place in range(number):
                key = those[place]
                address = first_key + key * key_bytes
                distance = squares_apart(query.ctypes.data, address, fours, keys[key, 0])
                for d in range(64 * fours, len(query)):
                    far = query[d] - as_single(keys[key, d])
                    distance += far * far
                distances[place] = distance
            if count + number > capacity:
                keep_smallest(mine, count, k)
                count = k
                word[0] = np.uint32(mine[k - 1] >> np.uint64(32))
                furthest[row] = one[0]
            least = furthest[row]
            for place in range(number):
                mine[count] = (np.uint64(bits[place]) << np.uint64(32)) | np.uint64(start + those[place])
                count += int(distances[place] < least)
            counts[row] = count
