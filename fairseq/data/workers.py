"""Worker processes: how each begins, and a pool whose results come in the order of its jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fairseq.errors import BadFile, UserError

AHEAD = 2  # jobs for each worker that are taken before their results are wanted, which bounds the memory


def begin_worker() -> None:
    """To be called first in a worker process: Ctrl-C is left to the parent, which ends its workers, and the process
    ends when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def killed_worker(path: str) -> UserError:
    """The error for a worker process that ended before its answer."""
    return UserError(f"{path}: a worker process was killed; try fewer --workers")


_work: list[Callable[[Any], Any]] = []  # of a worker process


def _begin(work: Callable[[Any], Any], prepare: Callable[[], None]) -> None:
    begin_worker()
    prepare()
    _work[:] = [work]


def _answer(job: Any) -> tuple[Any, tuple[str, str, str, str] | str | None]:
    try:
        return _work[0](job), None
    except BadFile as error:  # whose class cannot be pickled as it is
        return None, (error.file, error.found, error.expected, error.remedy)
    except UserError as error:
        return None, str(error)


def _result(future: Future[Any], path: str) -> Any:
    try:
        result, error = future.result()
    except BrokenProcessPool:
        raise killed_worker(path) from None
    if isinstance(error, tuple):
        raise BadFile(*error)
    if error is not None:
        raise UserError(error)
    return result


def in_order(
    work: Callable[[Any], Any], jobs: Iterable[Any], workers: int, path: str, prepare: Callable[[], None]
) -> Iterator[Any]:
    """work(job) for each of `jobs`, in their order, computed by `workers` processes (1: by this one).

    prepare is called first in each worker process; `path` is the file that a message about a killed one names. `work`
    need not be pickled, jobs and results are. At most a few jobs are taken ahead."""
    if workers == 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work, prepare))
    waiting: deque[Future[Any]] = deque()
    try:
        for job in jobs:
            waiting.append(_submit(pool, job, path))
            if len(waiting) > AHEAD * workers:
                yield _result(waiting.popleft(), path)
        while waiting:
            yield _result(waiting.popleft(), path)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, job: Any, path: str) -> Future[Any]:
    try:
        return pool.submit(_answer, job)
    except BrokenProcessPool:
        raise killed_worker(path) from None
