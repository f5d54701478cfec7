"""Compiled loops for the CPU, where arrays alone would move too much memory: distances to given entries from IVFPQ
codes.

They need numba (the `fast` extra). Without it, and on other devices, the array code in `pq_codes` computes the same.
Work is split by rows over Python threads, in which the kernels hold no lock; numba's own thread pool would change the
number of threads that torch and FAISS use."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fairseq.retrieval.faiss_import import limit_faiss_threads

numba: Any
try:
    import numba
except ImportError:  # the extra is not installed
    numba = None

AVAILABLE = numba is not None


def compiled(function: Any) -> Any:
    """A function as machine code that holds no lock, at its first call; without numba the function itself."""
    if numba is None:
        return function
    # sums may be reordered (as any vector code does), but infinities and NaN keep their meaning
    return numba.njit(cache=True, nogil=True, boundscheck=False, fastmath={"reassoc", "contract", "nsz"})(function)


def run_by_rows(kernel: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Calls `kernel(first_row, last_row, bounds, *arguments)` for ranges of rows with about equally many entries each.

    bounds: (B + 1,) int64, where each row's entries begin in the flat arrays."""
    rows, threads = len(bounds) - 1, torch.get_num_threads()
    cuts = np.searchsorted(bounds, np.linspace(0, bounds[-1], threads + 1)[1:-1])
    edges = [0, *cuts.tolist(), rows]
    ranges = [(first, last) for first, last in itertools.pairwise(edges) if first < last]
    if len(ranges) == 1:
        kernel(*ranges[0], bounds, *arguments)
        return
    waiting = [_pool().submit(kernel, first, last, bounds, *arguments) for first, last in ranges]
    for future in waiting:
        future.result()


def in_threads(work: Callable[[int, int], Any], rows: int) -> list[Any]:
    """Results, in order, of `work(first, last)` for about equal ranges of rows, one for each of torch's threads."""
    edges = np.linspace(0, rows, min(torch.get_num_threads(), max(rows, 1)) + 1).astype(int).tolist()
    if len(edges) == 2:
        return [work(*edges)]
    return each_in_thread(work, edges[:-1], edges[1:])


def each_in_thread(work: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """As `map`, each call in a thread of its own, within which torch, FAISS and these kernels use no others."""
    threads = torch.get_num_threads()

    def alone(*some: Any) -> Any:
        torch.set_num_threads(1)
        limit_faiss_threads()
        return work(*some)

    try:
        return list(_pool().map(alone, *arguments))
    finally:
        torch.set_num_threads(threads)  # what it sets of the whole process; the rest is each thread's own


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")


@compiled
def votes(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    scores: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    targets: np.ndarray,
    inverse_temperatures: np.ndarray,
    weights: np.ndarray,
    peak: np.ndarray,
    total: np.ndarray,
    hits: np.ndarray,
) -> None:
    """Per row b: peak[b] = max score, total[b, t] = sum of exp((score - peak[b]) / temperature t), each times its
    weight (n,) unless there are none (0,); hits[i] = whether entry i has the value targets[b]. Rows without entries
    keep what peak and total hold."""
    for row in range(first_row, last_row):
        first, last = bounds[row], bounds[row + 1]
        if first == last:
            continue
        largest = np.float32(-np.inf)
        for position in range(first, last):
            largest = max(largest, scores[position])
            hits[position] = values[ids[position]] == targets[row]
        peak[row] = largest
        for t in range(len(inverse_temperatures)):
            inverse = inverse_temperatures[t]
            mass = np.float32(0)
            if len(weights) == 0:
                for position in range(first, last):
                    mass += math.exp((scores[position] - largest) * inverse)
            else:
                for position in range(first, last):
                    mass += weights[position] * math.exp((scores[position] - largest) * inverse)
            total[row, t] = mass


@compiled
def emit_members(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    pointer_bounds: np.ndarray,
    pointer_ids: np.ndarray,
    state_bounds: np.ndarray,
    clusters: np.ndarray,
    indptr: np.ndarray,
    members: np.ndarray,
    ids: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Writes row b's pointers, then members of its clusters in the order given, until ids[bounds[b]:bounds[b + 1]] is
    full; rows receives b."""
    for row in range(first_row, last_row):
        position, last = bounds[row], bounds[row + 1]
        rows[position:last] = row
        for pointer in range(pointer_bounds[row], pointer_bounds[row + 1]):
            ids[position] = pointer_ids[pointer]
            position += 1
        for state in range(state_bounds[row], state_bounds[row + 1]):
            cluster = clusters[state]
            begin = indptr[cluster]
            count = min(indptr[cluster + 1] - begin, last - position)
            for offset in range(count):
                ids[position + offset] = members[begin + offset]
            position += count
            if position == last:
                break


@compiled
def greedy_merge(
    order: np.ndarray,
    neighbours: np.ndarray,
    values: np.ndarray,
    width: int,
    weights: np.ndarray,
    absorber: np.ndarray,
) -> None:
    """Entries absorb, in the given order, those of their first `width` neighbours (N, k) that have their value and
    weight 1; weights (N,) and absorber (N,) are changed in place."""
    for entry in order:
        if weights[entry] == 0:
            continue
        for column in range(width):
            other = neighbours[entry, column]
            if other >= 0 and other != entry and weights[other] == 1 and values[other] == values[entry]:
                weights[other] = 0
                absorber[other] = entry
                weights[entry] += 1
