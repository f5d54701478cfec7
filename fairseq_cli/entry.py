"""Runs every command: sets the log format, and ends the process with one sentence and exit status 2 after a user's
mistake."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from fairseq import __version__, refusals
from fairseq.errors import BadFlag, UserError, is_out_of_memory
from fairseq.files.atomic_io import is_full
from fairseq.files.folders import forget_folders, remove_empty_folders
from fairseq.files.output_lock import release_all
from fairseq_cli.starting import OUT_OF_MEMORY, is_program

LOG_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


PATIENCE = 2.0  # seconds
_first_again: list[Callable[[], object]] = []


def setup_logging(stream: TextIO) -> None:
    """Sends log lines to `stream` in fairseq's form: `YYYY-mm-dd HH:MM:SS | INFO | name | message`."""
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise BadFlag("LOGLEVEL", level, ", ".join(logging.getLevelNamesMapping()), "set another or unset it")
    logging.raiseExceptions = False  # a log file on a full disk must not print tracebacks
    if isinstance(stream, io.TextIOWrapper):  # print characters that the locale cannot encode as escapes
        stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=LOG_FORMAT, datefmt=DATE_FORMAT, level=level, stream=stream, force=True)


def log_start(logger: logging.Logger, args: Any) -> None:
    """The first line of a log: the program, its version and the flags that were typed. All settings, those of defaults
    too, are for `LOGLEVEL=DEBUG`; where a Python program made them, nothing was typed."""
    typed = shlex.join(sys.argv[1:]) if is_program() else "called from Python"
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in typed)
    logger.info("%s %s: %s", logger.name.rpartition(".")[2], __version__, shown)
    logger.debug("%s", args)


def cli_entry(main: Callable[[], object], stream: TextIO | None = None, goes_on: bool = False) -> None:
    """Runs `main` as a command-line program: exit status 0, 2 for a user's mistake, 130 for Ctrl-C. goes_on: whether
    the same command continues after an interruption, which the message after Ctrl-C then says."""
    refusals.reset()
    forget_folders()
    program = os.path.basename(sys.argv[0])
    with _one_interrupt():
        _run(main, program, stream, goes_on)


def _run(main: Callable[[], object], program: str, stream: TextIO | None, goes_on: bool) -> None:
    try:
        setup_logging(stream if stream is not None else sys.stdout)
        with _no_lost_interrupt():
            main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        sys.exit(_say(program, str(error), 2))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(_say(program, f"{OUT_OF_MEMORY} ({_amount(error)})", 2))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            sys.exit(_say(program, OUT_OF_MEMORY, 2))
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and run the same command again" if is_full(error) else ""
        sys.exit(_say(program, f"{where}{error.strerror or error}{remedy}", 2))
    except KeyboardInterrupt:
        remedy = "run the same command again to go on" if goes_on else "the same command starts from the beginning"
        sys.exit(_say(program, f"interrupted; {remedy}", 130))
    finally:
        release_all()


def _amount(error: BaseException) -> str:
    """The amount of memory that was requested, if the error message has it."""
    requested = re.search(r"allocate ([0-9.]+ ?[KMGTP]?i?B|[0-9]+ bytes)", str(error))
    return f"{requested[1]} could not be allocated" if requested else "an allocation or a thread failed"


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Handles Ctrl-C: only the first of several raises an exception, since others would interrupt the cleaning up, or
    the final message. Those within PATIENCE seconds of the first are ignored; later ones raise again, so that a command
    that hangs can still be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = [-math.inf]

    def handler(number: int, frame: object) -> None:
        before, last[0] = last[0], time.monotonic()
        if last[0] - before > PATIENCE:
            raise KeyboardInterrupt

    _first_again.append(lambda: last.__setitem__(0, -math.inf))
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        _first_again.pop()
        if is_program():  # only the shutdown of the interpreter follows, which need not be interrupted
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _no_lost_interrupt() -> Iterator[None]:
    """Handles a Ctrl-C whose exception is lost: in callbacks from C code (numba reads its cache in one) and in
    finalisers, Python only reports exceptions. Instead of the report, the signal is raised again for the code that
    follows."""
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)
            return
        for again in _first_again:
            again()
        # Python looks for signals at the end of a call, and would raise it in here: so unpacking makes this one.
        [_] = map(_thread.interrupt_main, [signal.SIGINT])

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report


def _say(program: str, sentence: str, status: int) -> int:
    release_all()
    remove_empty_folders()
    _flush_output()
    sys.stderr.write(f"{program}: error: {' '.join(sentence.split())}\n")
    return status


def _flush_output() -> None:
    """What is still to be printed; nothing more is, if nobody reads it (a closed pipe) or it cannot be kept."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # the interpreter would try again at its end, and report that
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
