"""fairseq's functions about ranks and processes, for a single process; runs with several processes are refused."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fairseq.errors import BadFlag, UserError


def infer_init_method(args: argparse.Namespace) -> None:
    """Refuses a run with several processes, requested by flags or by the launcher's environment variables."""
    world = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if world > 1:
        raise UserError(
            f"WORLD_SIZE: found {world}, expected 1; this package trains in one process: start it without a launcher"
        )
    if not is_master(args):
        remedy = "drop it: only rank 0 saves checkpoints, and this package trains in one process"
        raise BadFlag("--distributed-rank", args.distributed_rank, "0", remedy)
    if args.distributed_world_size > 1:
        raise BadFlag(
            "--distributed-world-size",
            args.distributed_world_size,
            "1",
            "this package trains in one process: use one process on one GPU",
        )


def is_master(args: argparse.Namespace) -> bool:
    """Whether this process writes files."""
    return getattr(args, "distributed_rank", 0) == 0


def get_rank() -> int:
    """This process's number."""
    return 0


def get_world_size() -> int:
    """The number of processes."""
    return 1


def all_gather_list(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
    """A list with the data of each process, by rank."""
    return [data]
