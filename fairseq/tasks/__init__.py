"""Tasks: a task joins data and model. `register_task` adds one; `setup_task` makes the one that args name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq.errors import BadFlag
from fairseq.registry import set_defaults
from fairseq.tasks.fairseq_task import FairseqTask

TASK_REGISTRY: dict[str, Any] = {}
TASK_CLASS_NAMES: set[str] = set()


def setup_task(args: argparse.Namespace, **kwargs: Any) -> FairseqTask:
    """Makes the task named by `args.task`."""
    if args.task not in TASK_REGISTRY:
        raise BadFlag("--task", args.task, "one of " + ", ".join(sorted(TASK_REGISTRY)))
    set_defaults(args, TASK_REGISTRY[args.task])
    return TASK_REGISTRY[args.task].setup_task(args, **kwargs)


def register_task(name: str) -> Callable[[type], type]:
    """Class decorator that makes a FairseqTask available as `--task NAME`; ValueError for a name or class used
    twice."""

    def decorate(cls: type) -> type:
        if name in TASK_REGISTRY:
            raise ValueError(f"cannot register a second task named {name}")
        if not issubclass(cls, FairseqTask):
            raise ValueError(f"task {name}: {cls.__name__} must extend FairseqTask")
        if cls.__name__ in TASK_CLASS_NAMES:
            raise ValueError(f"cannot register a second task class named {cls.__name__}")
        TASK_REGISTRY[name] = cls
        TASK_CLASS_NAMES.add(cls.__name__)
        return cls

    return decorate


def get_task(name: str) -> Any:
    """The class registered under `name`."""
    return TASK_REGISTRY[name]


from fairseq.tasks import language_modeling  # noqa: E402, F401  (fills the registry)

__all__ = ["TASK_REGISTRY", "FairseqTask", "get_task", "register_task", "setup_task"]
