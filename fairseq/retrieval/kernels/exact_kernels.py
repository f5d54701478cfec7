"""Compiled loops of exact search (`exact_index`) and of distances from the keys. They need numba (`kernels`)."""

from __future__ import annotations

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import compiled

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.intrinsics import as_single, prefetch

RUN = 32  # scores compared at a time, by vector instructions, before single scores are examined
AHEAD = 16  # number of keys by which prefetching is ahead of computing
CACHE_LINE = 64  # bytes


@compiled
def keep_smallest(items: np.ndarray, count: int, k: int) -> None:
    """Moves the k smallest of items[:count] to the front (quickselect; all items differ)."""
    low, high = 0, count - 1
    while low < high:
        a, b, c = items[low], items[(low + high) // 2], items[high]
        pivot = max(min(a, b), min(max(a, b), c))
        left, right = low, high
        while left <= right:
            while items[left] < pivot:
                left += 1
            while items[right] > pivot:
                right -= 1
            if left <= right:
                items[left], items[right] = items[right], items[left]
                left += 1
                right -= 1
        if k - 1 <= right:
            high = right
        elif k - 1 >= left:
            low = left
        else:
            return


@compiled
def offer_block(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    scores: np.ndarray,
    slack: np.ndarray,
    queries: np.ndarray,
    keys: np.ndarray,
    start: int,
    k: int,
    items: np.ndarray,
    counts: np.ndarray,
    furthest: np.ndarray,
) -> None:
    """Adds the keys of a block to the nearest items of each query, for a range of rows (queries).

    scores (B, n): approximations of half the squared distances; slack (B,): by how much half a distance may be smaller
    than its score; queries (B, D); keys (n, D) float32, the first of which is entry `start`; items (B, C > k) uint64:
    the bits of a distance, then an entry; counts (B,): number of items of each row; furthest (B,): a distance that at
    least k items do not exceed.

    The bits of float32 numbers that are not negative sort like the numbers. Entries are processed in ascending order,
    so that of equal distances the first entries are kept. Where a score is NaN, because the key is too large to
    multiply, the distance is computed."""
    columns, capacity = scores.shape[1], items.shape[1]
    one = np.empty(1, np.float32)
    word = one.view(np.uint32)
    for row in range(first_row, last_row):
        line, mine, count, query = scores[row], items[row], counts[row], queries[row]
        for begin in range(0, columns, RUN):
            limit = furthest[row] * np.float32(0.5001) + slack[row]  # a little more than half: for rounding
            some = line[begin : begin + RUN]
            near = np.int32(0)
            for place in range(len(some)):
                near |= np.int32(not some[place] > limit)
            if near == 0:
                continue
            for place in range(len(some)):
                if some[place] > limit:
                    continue
                key = keys[begin + place]
                distance = np.float32(0)
                for d in range(len(query)):
                    difference = query[d] - key[d]
                    distance += difference * difference
                if not distance < furthest[row]:
                    continue
                one[0] = distance
                mine[count] = (np.uint64(word[0]) << np.uint64(32)) | np.uint64(start + begin + place)
                count += 1
                if count == capacity:
                    keep_smallest(mine, count, k)
                    count = k
                    word[0] = np.uint32(mine[k - 1] >> np.uint64(32))
                    furthest[row] = one[0]
        counts[row] = count


@compiled
def key_distances(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    queries: np.ndarray,
    ids: np.ndarray,
    keys: np.ndarray,
    out: np.ndarray,
) -> None:
    """Squared L2 distance of query b to the keys of entries ids[bounds[b]:bounds[b + 1]], into out (n,) float32.

    queries (B, D) float32; keys (N, D), float32 or the bits of float16. Keys are at random places in memory, so each is
    prefetched well before it is needed. The distance to a key that is not finite is infinite."""
    start, width, end = keys.ctypes.data, keys.strides[0], bounds[last_row]
    for row in range(first_row, last_row):
        query = queries[row]
        for position in range(bounds[row], bounds[row + 1]):
            if position + AHEAD < end:
                address = start + ids[position + AHEAD] * width
                for line in range(address, address + width, CACHE_LINE):
                    prefetch(line)
            key = keys[ids[position]]
            total = np.float32(0)
            for d in range(len(query)):
                difference = query[d] - as_single(key[d])
                total += difference * difference
            out[position] = total if total < np.inf else np.float32(np.inf)
