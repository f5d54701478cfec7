"""Compiled loops of the exact search's pass over whole numbers (`exact_whole`). They need numba, as `kernels` does."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval.exact_kernels import RUN
from fairseq.retrieval.kernels import _compile as compiled

SHIFTED = np.int32(32768)  # added before numbers are cut to whole ones, which rounds down where they are positive
LENIENT = 32  # one part in so many more than k is as good as k


@compiled
def round_vectors(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    vectors: np.ndarray,
    centre: np.ndarray,
    step: float,
    reach: np.ndarray,
    weight: np.ndarray,
    extra: np.ndarray,
    rows: np.ndarray,
    facts: np.ndarray,
) -> None:
    """Rounds vectors (n, D) float32, less the centre, to steps: rows (n, W) int8, facts (4, n) as `Columns.rounded`.

    reach (D,): steps at which a coordinate is clipped; weight (2, D): w^-2 and w^2; extra (2, E): of the columns after
    the first D, a coordinate and how many steps of it the columns before hold."""
    dimension, columns = vectors.shape[1], extra.shape[1]
    steps = np.empty(dimension, np.int32)
    inverse = np.float32(1) / step
    less, more, coordinates, before = weight[0], weight[1], extra[0], extra[1]
    most, shift, half = np.int32(127), SHIFTED, np.float32(32768.5)
    for row in range(first_row, last_row):
        vector, out = vectors[row], rows[row]
        norm = wide = lost = held = np.float32(0)
        for d in range(dimension):
            value = vector[d] - centre[d]
            scaled = value * inverse
            scaled = reach[d] if scaled > reach[d] else scaled
            scaled = -reach[d] if scaled < -reach[d] else scaled
            whole = np.int32(np.int32(scaled + half) - shift)
            kept = np.float32(whole) * step
            left = value - kept
            norm += value * value
            wide += value * value * more[d]
            lost += left * left * less[d]
            held += kept * kept * more[d]
            steps[d] = whole
        for d in range(dimension):
            out[d] = np.int8(min(max(steps[d], -most), most))
        for column in range(columns):
            whole = steps[coordinates[column]]
            whole = np.int32(whole - min(max(whole, -before[column]), before[column]))
            out[dimension + column] = np.int8(min(max(whole, -most), most))
        facts[0, row] = norm * np.float32(0.5)
        facts[1, row] = math.sqrt(wide)
        facts[2, row] = math.sqrt(lost)
        facts[3, row] = math.sqrt(held)


@compiled
def at_least_smallest(values: np.ndarray, k: int, enough: int) -> int:
    """The bits of a number that k of the values (n >= k,), bits of float32 numbers of at least 0, do not exceed, and
    at most `enough` where they differ: found by counting, which takes whole vectors at a time."""
    low, high = np.int32(-1), np.int32(0x7F7FFFFF)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        count = np.int32(0)
        for place in range(len(values)):
            count += np.int32(values[place] <= middle)
        if count < k:
            low = middle
        else:
            high = middle
            if count <= enough:
                break
    return int(high)


@compiled
def offer_products(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    products: np.ndarray,
    asked: np.ndarray,
    known: np.ndarray,
    step: float,
    rounding: float,
    start: int,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    highest: np.ndarray,
    limits: np.ndarray,
) -> None:
    """Offers a block of keys to each query of a range of rows.

    products (B, n) int32; asked (4, B) and known (4, n): facts of queries and keys; items (B, C), highest (B, C),
    counts (B,) and limits (B,): see `Candidates`."""
    columns, capacity = products.shape[1], items.shape[1]
    scale, nought = np.float32(step * step), np.float32(0)
    base, wide, lost = known[0], known[1], known[2]
    values = np.empty(columns, np.float32)
    errors = np.empty(columns, np.float32)
    chosen = np.empty(columns + 1, np.int32)
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    for row in range(first_row, last_row):
        count = counts[row]
        if count < 0:
            continue
        line, mine, upper = products[row], items[row], highest[row]
        my_held, my_lost = np.float32(1.01) * asked[3, row], np.float32(1.01) * asked[2, row]
        own, limit = asked[0, row], limits[row]
        for column in range(columns):
            norms = base[column] + own
            errors[column] = my_held * lost[column] + my_lost * wide[column] + rounding * norms
            values[column] = norms - scale * np.float32(line[column]) - errors[column]
        found = 0
        for begin in range(0, columns, RUN):
            end = min(begin + RUN, columns)
            near = np.int32(0)
            for column in range(begin, end):
                near += np.int32(values[column] <= limit)
            if near == 0:
                continue
            for column in range(begin, end):
                chosen[found] = column
                found += int(values[column] <= limit)
        if count + found > capacity:
            word[0] = np.uint32(at_least_smallest(upper[:count].view(np.int32), k, k + k // LENIENT))
            one[0] = one[0] * np.float32(1.0002)  # more than distances are off by rounding
            limits[row], most = one[0], np.uint64(word[0]) << np.uint64(32) | np.uint64(0xFFFFFFFF)
            kept = 0
            for place in range(count):
                item = mine[place]
                mine[kept], upper[kept] = item, upper[place]
                kept += int(item <= most)
            count = kept
            if count + columns > capacity:
                counts[row] = -1
                continue
        for place in range(found):
            column = chosen[place]
            one[0] = max(values[column], nought)
            mine[count + place] = (np.uint64(word[0]) << np.uint64(32)) | np.uint64(start + column)
            upper[count + place] = one[0] + 2 * errors[column]
        counts[row] = count + found


@compiled
def least_highest_first(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    items: np.ndarray,
    highest: np.ndarray,
    counts: np.ndarray,
    k: int,
    firsts: np.ndarray,
) -> None:
    """Moves about k items with the least upper bounds of each query to the front; firsts (B,): how many."""
    for row in range(first_row, last_row):
        count, mine, upper = counts[row], items[row], highest[row]
        kept = 0
        if count > 0:
            bits = upper[:count].view(np.int32)
            most = at_least_smallest(bits, k, k + k // LENIENT)
            for place in range(count):
                item, bit = mine[place], bits[place]
                mine[place], bits[place] = mine[kept], bits[kept]
                mine[kept], bits[kept] = item, bit
                kept += int(bit <= most)
        firsts[row] = kept


@compiled
def within_furthest(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    items: np.ndarray,
    firsts: np.ndarray,
    counts: np.ndarray,
    k: int,
) -> None:
    """The first items of each query (as left by `least_highest_first`) hold distances: moves those behind them that may
    be nearer than the k-th of these up to them and cuts counts (B,) down to them."""
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    bits = np.empty(items.shape[1], np.int32)
    for row in range(first_row, last_row):
        count, first, mine = counts[row], firsts[row], items[row]
        if count <= 0:
            continue
        for place in range(first):
            bits[place] = np.int32(mine[place] >> np.uint64(32))
        word[0] = np.uint32(at_least_smallest(bits[:first], k, k))
        one[0] = one[0] * np.float32(0.5001)  # a little more than half: distances are off by rounding
        most = np.uint64(word[0]) << np.uint64(32) | np.uint64(0xFFFFFFFF)
        kept = first
        for place in range(first, count):
            item = mine[place]
            mine[kept] = item
            kept += int(item <= most)
        counts[row] = kept


@compiled
def measure(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    pairs: np.ndarray,
    queries: np.ndarray,
    words: np.ndarray,
    items: np.ndarray,
) -> None:
    """Squared L2 distances of the entry that pairs[bounds[n]:bounds[n + 1]] share to their queries, into their items.

    pairs uint64, an entry and a place in the flat items (B, C); queries (B, D); words (N, D), the bits of the keys:
    uint16 (float16) or uint32 (float32). The bits of a half, moved to their places in a single, are 2^-112 times its
    value, also below the normal range."""
    dimension, capacity = queries.shape[1], items.shape[1]
    half = words.itemsize == 2
    bits = np.empty(dimension, np.int32)
    key = bits.view(np.float32)
    scale = np.float32(2.0**112) if half else np.float32(1)
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    for row in range(first_row, last_row):
        entry = pairs[bounds[row]] >> np.uint64(32)
        source = words[np.int64(entry)]
        if half:
            for d in range(dimension):
                number = np.int32(source[d])
                magnitude = np.int32((number & np.int32(0x7FFF)) << np.int32(13))
                bits[d] = magnitude | np.int32((number & np.int32(0x8000)) << np.int32(16))
            for d in range(dimension):
                key[d] *= scale
        else:
            for d in range(dimension):
                bits[d] = np.int32(source[d])
        for position in range(bounds[row], bounds[row + 1]):
            place = np.int64(pairs[position] & np.uint64(0xFFFFFFFF))
            query = queries[place // capacity]
            distance = np.float32(0)
            for d in range(dimension):
                difference = query[d] - key[d]
                distance += difference * difference
            one[0] = distance
            items[place // capacity, place % capacity] = (np.uint64(word[0]) << np.uint64(32)) | entry
