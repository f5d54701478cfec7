"""Compiling and running loops on the CPU, for computations in which array operations would move too much memory. The
loops are in the modules named `*_kernels`; for each of them there is array code that computes the same.

Compiled loops need numba (the `fast` extra). Without numba, where it cannot be used, and on other devices, the array
code is used. Machine code is cached beside the source or in the user's cache folder; where neither can be written, each
process compiles again. Work is divided by rows among Python threads, and the kernels release the GIL; numba's own
thread pool is not used, because it would change the number of threads that torch and FAISS use."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fairseq.retrieval.faiss_import import limit_faiss_threads

logger = logging.getLogger(__name__)

LEAST_VERSION = (0, 61)
UNUSABLE = "numba cannot be used (%s), so that array code, which is slower, computes the same"
UNCACHED = "compiled loops cannot be kept for the next process (%s), which takes a few seconds each time"


def _import_numba() -> Any:
    """numba, or None where it is not installed, or where it cannot be used (then with a warning)."""
    try:
        import numba
        from llvmlite import binding, ir  # noqa: F401  (`instructions` needs these)
        from numba import extending, types  # noqa: F401
        from numba.core import caching, cgutils  # noqa: F401

        version = tuple(int(part) for part in re.findall(r"\d+", numba.__version__)[:2])
        if version < LEAST_VERSION:
            reason = f"version {numba.__version__}, where {'.'.join(map(str, LEAST_VERSION))} is needed"
        elif getattr(numba.config, "DISABLE_JIT", False):
            reason = "NUMBA_DISABLE_JIT is set"
        else:
            return numba
    except ModuleNotFoundError as error:
        if error.name == "numba":  # the extra is not installed
            return None
        reason = str(error)
    except Exception as error:  # an incomplete installation may raise exceptions of any kind
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unknown reason'}"
    logger.warning(UNUSABLE, reason)
    return None


numba: Any = _import_numba()
AVAILABLE = numba is not None


def compiled(function: Any) -> Any:
    """The function compiled at its first call, to machine code that releases the GIL; without numba the function
    itself.

    Sums may be reordered (as in any vector code), but infinities and NaN are handled as usual."""
    return _compiled(function, {"reassoc", "contract", "nsz"})


def compiled_in_order(function: Any) -> Any:
    """As `compiled`, but sums are computed in the order in which they are written."""
    return _compiled(function, {"contract", "nsz"})


def _compiled(function: Any, freedoms: set[str]) -> Any:
    if numba is None:
        return function
    settings = {"nogil": True, "boundscheck": False, "fastmath": freedoms}
    try:
        dispatcher = numba.njit(cache=True, **settings)(function)
    except RuntimeError as error:  # neither the source's folder nor the user's can be written
        _warn_once(str(error).splitlines()[0])
        return numba.njit(**settings)(function)
    if hasattr(dispatcher, "_cache"):
        dispatcher._cache = _ForgivingCache(dispatcher._cache)
    return dispatcher


@functools.cache
def _warn_once(reason: str) -> None:
    if not _warn_once.cache_info().currsize:
        logger.warning(UNCACHED, reason)


class _ForgivingCache:
    """numba's cache of a function, but the function is compiled without a cache when files cannot be read or written: a
    full disk, or incomplete files of a killed process."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *arguments: Any) -> Any:
        """See numba; None when nothing usable is there."""
        try:
            return self._cache.load_overload(*arguments)
        except Exception as error:  # unpickling and linking of damaged files may raise exceptions of any kind
            _warn_once(f"{type(error).__name__} while reading {self._cache.cache_path}")
            return None

    def save_overload(self, *arguments: Any) -> None:
        """See numba."""
        try:
            self._cache.save_overload(*arguments)
        except OSError as error:
            _warn_once(f"{self._cache.cache_path}: {error.strerror or error}")


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
    """As `map`, with each call in a separate thread, in which torch, FAISS and these kernels use a single thread."""
    threads = torch.get_num_threads()

    def single_threaded(*some: Any) -> Any:
        torch.set_num_threads(1)
        limit_faiss_threads()
        return work(*some)

    try:
        return list(_pool().map(single_threaded, *arguments))
    finally:
        torch.set_num_threads(threads)  # part of the setting is global to the process, so it is restored


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")
