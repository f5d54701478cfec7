"""Refusals that `--force` overrides: artefacts that do not belong together, and jobs that do not fit on the disk or in
memory. Overridden refusals are recorded in the results file."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from fairseq.errors import UserError
from fairseq.sizes import size_text

logger = logging.getLogger(__name__)

_state: dict[str, Any] = {"force": False, "forced": []}


def reset(force: bool = False) -> None:
    """Makes refusals effective again (unless `force`) and clears the list of overridden ones; called when a command
    starts."""
    _state.update(force=force, forced=[])


def refuse(error: UserError) -> None:
    """Raises `error`; with `--force` logs it as a warning, and records it for the results file."""
    if not _state["force"]:
        raise error
    if str(error) not in _state["forced"]:
        logger.warning("--force: continuing although %s", error)
        _state["forced"].append(str(error))


def forced() -> list[str]:
    """The messages of the refusals that `--force` has overridden so far."""
    return list(_state["forced"])


class Force(argparse.Action):
    """The action of `--force`."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True)
        _state["force"] = True


def add_force(parser: Any) -> None:
    """Adds `--force` to a parser or group."""
    parser.add_argument("--force", action=Force, help="go on where artefacts do not match or a plan does not fit")


def available_memory() -> int | None:
    """Bytes of memory that this process can still allocate: free memory of the machine, or of its container if that has
    less."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", "rb") as limit, open("/sys/fs/cgroup/memory.current", "rb") as used:
            limits.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    return max(0, min(limits))


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Refuses a job that needs `needed` bytes of memory if fewer are available."""
    available = available_memory()
    if available is not None and needed > available:
        refuse(
            UserError(
                f"{what} needs about {size_text(needed)} of memory, and {size_text(available)} are free; "
                f"{remedy}, or go on with --force"
            )
        )
