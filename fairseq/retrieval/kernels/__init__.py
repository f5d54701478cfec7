"""How compiled loops are made and run, for the CPU, where arrays alone would move too much memory. The loops themselves
stand in the files named `*_kernels`, each beside the array code that does the same.

They need numba (the `fast` extra). Without it, and on other devices, the array code computes the same. Work is split by
rows over Python threads, in which the kernels hold no lock; numba's own thread pool would change the number of threads
that torch and FAISS use."""

from __future__ import annotations

import functools
import itertools
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
    """A function as machine code that holds no lock, at its first call; without numba the function itself.

    Sums may be reordered (as any vector code does), but infinities and NaN keep their meaning."""
    return _compiled(function, {"reassoc", "contract", "nsz"})


def compiled_in_order(function: Any) -> Any:
    """As `compiled`, but sums stay in the order in which they are written."""
    return _compiled(function, {"contract", "nsz"})


def _compiled(function: Any, freedoms: set[str]) -> Any:
    if numba is None:
        return function
    return numba.njit(cache=True, nogil=True, boundscheck=False, fastmath=freedoms)(function)


def run_by_rows(kernel: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Calls `kernel(first_row, last_row, bounds, *arguments)` for ranges of rows with about equally many entries each.

    bounds: (B + 1,) int64, where each row's entries begin in the flat arrays."""
    rows, threads = len(bounds) - 1, torch.get_num_threads()
    cuts: list[int] = []
    if threads > 1:
        cuts = np.searchsorted(bounds, np.linspace(0, bounds[-1], threads + 1)[1:-1]).tolist()
    edges = [0, *cuts, rows]
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
