"""Tasks: a task joins data and model. `register_task` adds one; `setup_task` makes the one that args name."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.registry import class_registrar, set_defaults, unknown_name
from fairseq.tasks.fairseq_task import FairseqTask

TASK_REGISTRY: dict[str, Any] = {}
register_task = class_registrar("--task", TASK_REGISTRY, FairseqTask)  # @register_task("name")


def setup_task(args: argparse.Namespace, **kwargs: Any) -> FairseqTask:
    """Makes the task named by `args.task`; BadFlag when no such task is registered."""
    if args.task not in TASK_REGISTRY:
        raise unknown_name("--task", args.task, TASK_REGISTRY)
    set_defaults(args, TASK_REGISTRY[args.task])
    return TASK_REGISTRY[args.task].setup_task(args, **kwargs)


def get_task(name: str) -> Any:
    """The class registered under `name`."""
    return TASK_REGISTRY[name]


from fairseq.tasks import language_modeling  # noqa: E402, F401  (fills the registry)

__all__ = ["TASK_REGISTRY", "FairseqTask", "get_task", "register_task", "setup_task"]
