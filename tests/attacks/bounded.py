"""Runs a function in a child process whose memory is limited, so that an attack that allocates memory makes the test
fail, not the machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20


def bounded(function: Callable[..., Any], *arguments: Any, memory: int = 256 << 20) -> Any:
    """What `function(*arguments)` returns, or the exception that it raises, when it may take `memory` bytes more than
    the process has and 20 seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        child = multiprocessing.get_context("fork").Process(target=_child, args=(result, memory, function, arguments))
        child.start()
        child.join()
        assert child.exitcode == 0, f"the process ended with status {child.exitcode}"
        return pickle.loads(result.read_bytes())


def sentence(function: Callable[..., Any], *arguments: Any, memory: int = 256 << 20) -> str:
    """The one sentence of the UserError that `function(*arguments)` must raise, within the same limits."""
    kind, text = bounded(_refusal, function, arguments, memory=memory)
    assert kind == "UserError", f"{kind}: {text}"
    assert "\n" not in text and len(text) < 1000, text
    return text


def _refusal(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, str]:
    from fairseq.errors import UserError

    try:
        return "nothing was raised", repr(function(*arguments))[:200]
    except UserError as error:
        return "UserError", str(error)
    except Exception as error:
        return type(error).__name__, str(error)


def _child(result: Path, memory: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.alarm(SECONDS)
    result.write_bytes(pickle.dumps(function(*arguments)))
