"""Compiled loops of the exact search's pass over whole numbers (`exact_whole`). They need numba, as `kernels` does."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.exact_kernels import RUN, keep_smallest
from fairseq.retrieval.kernels import compiled

if kernels.AVAILABLE:
    from fairseq.retrieval.instructions import as_single

SHIFTED = np.int32(32768)  # added before numbers are cut to whole ones, which rounds down where they are positive


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
    """Rounds vectors (n, D), float32 or bits of halves, less the centre, to steps: rows (n, W) int8, facts (4, n) as
    `Columns.rounded`.

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
            value = as_single(vector[d]) - centre[d]
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
def offer_products(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    products: np.ndarray,
    asked: np.ndarray,
    known: np.ndarray,
    step: float,
    rounding: float,
    queries: np.ndarray,
    keys: np.ndarray,
    start: int,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> None:
    """Offers a block of keys to each query of a range of rows, as `exact_kernels.offer_block` does.

    products (B, n) int32; asked (4, B) and known (4, n): facts of queries and keys; rounding: of sums of float32
    numbers; keys (n, D) float32 or bits of halves; items (B, C >= k + n). Keys whose norms are not finite are never
    near: what is computed of them is NaN."""
    columns, capacity = products.shape[1], items.shape[1]
    scale = np.float32(step * step)
    base, wide, lost = known[0], known[1], known[2]
    values = np.empty(columns, np.float32)
    chosen = np.empty(columns + 1, np.int32)
    distances = np.empty(columns + 1, np.float32)
    bits = distances.view(np.uint32)
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    for row in range(first_row, last_row):
        line, mine, count, query = products[row], items[row], counts[row], queries[row]
        my_held, my_lost = np.float32(1.01) * asked[3, row], np.float32(1.01) * asked[2, row]
        own, limit = asked[0, row], furthest[row] * np.float32(0.5001)  # a little more than half: for rounding
        for column in range(columns):
            norms = base[column] + own
            error = my_held * lost[column] + my_lost * wide[column] + rounding * norms
            values[column] = norms - scale * np.float32(line[column]) - error
        found = np.uint64(0)  # as an index, one that cannot be negative is faster
        for begin in range(0, columns, RUN):
            some = values[begin : begin + RUN]
            near = np.int32(0)
            for place in range(len(some)):
                near |= np.int32(some[place] <= limit)
            if near == 0:
                continue
            for place in range(len(some)):
                chosen[found] = begin + place
                found += np.uint64(some[place] <= limit)
        many = int(found)
        for place in range(0, many, 2):  # two at a time, which share the reading of the query
            this, that = keys[chosen[place]], keys[chosen[min(place + 1, many - 1)]]
            this_distance = that_distance = np.float32(0)
            for d in range(len(query)):
                this_far, that_far = query[d] - as_single(this[d]), query[d] - as_single(that[d])
                this_distance += this_far * this_far
                that_distance += that_far * that_far
            distances[place], distances[place + 1] = this_distance, that_distance
        if count + many > capacity:
            keep_smallest(mine, count, k)
            count = k
            word[0] = np.uint32(mine[k - 1] >> np.uint64(32))
            furthest[row] = one[0]
        least = furthest[row]
        for place in range(many):
            mine[count] = (np.uint64(bits[place]) << np.uint64(32)) | np.uint64(start + chosen[place])
            count += int(distances[place] < least)
        counts[row] = count
