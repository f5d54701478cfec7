"""Flags of `train.py`: several processes, the architecture, optimisation, checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.flag_types import any_int, finite_float, int_list, natural_int, output_folder, positive_int, rate_list
from fairseq.models import ARCH_MODEL_REGISTRY


def add_distributed_training_args(parser: argparse.ArgumentParser) -> Any:
    """Distributed training."""
    group = parser.add_argument_group("Distributed training")
    add = group.add_argument
    add(
        "--distributed-world-size",
        type=positive_int,
        default=1,
        metavar="N",
        help="1: this package trains in one process",
    )
    add("--distributed-rank", default=0, type=any_int, metavar="N", help="of several processes")
    add("--distributed-backend", default="nccl", metavar="NAME", help="of several processes")
    add("--distributed-init-method", metavar="URL", help="of several processes")
    add("--distributed-port", default=-1, type=any_int, metavar="N", help="of several processes")
    add("--device-id", "--local_rank", default=0, type=any_int, metavar="N", help="GPU to use")
    add("--distributed-no-spawn", action="store_true", help="of several processes")
    add(
        "--ddp-backend",
        default="c10d",
        choices=["c10d", "no_c10d", "pytorch_ddp", "legacy_ddp"],
        help="exchange of gradients between processes",
    )
    add("--bucket-cap-mb", default=25, type=any_int, metavar="MB", help="of several processes")
    add("--fix-batches-to-gpus", action="store_true", help="keep a batch on its GPU in every epoch")
    add("--find-unused-parameters", action="store_true", help="of several processes")
    add("--broadcast-buffers", action="store_true", help="of several processes")
    add("--fast-stat-sync", action="store_true", help="of several processes")
    return group


def add_model_args(parser: argparse.ArgumentParser) -> Any:
    """The choice of the architecture."""
    group = parser.add_argument_group("Model configuration")
    group.add_argument(
        "--arch",
        "-a",
        default="transformer_lm",
        metavar="ARCH",
        choices=sorted(ARCH_MODEL_REGISTRY),
        help="architecture",
    )
    return group


def add_optimization_args(parser: argparse.ArgumentParser) -> Any:
    """Optimisation."""
    group = parser.add_argument_group("Optimization")
    add = group.add_argument
    add("--max-epoch", "--me", default=0, type=natural_int, metavar="N", help="stop after N epochs (default: no limit)")
    add(
        "--max-update",
        "--mu",
        default=0,
        type=natural_int,
        metavar="N",
        help="stop after N updates (default: no limit)",
    )
    add(
        "--clip-norm",
        default=25.0,
        type=finite_float,
        metavar="NORM",
        help="clip gradients to this norm (0: only measure)",
    )
    add("--sentence-avg", action="store_true", help="normalise gradients by samples instead of tokens")
    add("--update-freq", default=[1], type=int_list, metavar="N1,N2,...", help="batches per update, by epoch")
    add("--lr", "--learning-rate", default=[0.25], type=rate_list, metavar="LR1,LR2,...", help="learning rates")
    add(
        "--min-lr",
        default=-1.0,
        type=finite_float,
        metavar="LR",
        help="stop when the rate is not above this (default: never)",
    )
    add(
        "--stop-min-lr",
        type=finite_float,
        metavar="LR",
        help="newer name of --min-lr, which then is the lowest rate of cosine",
    )
    add("--use-bmuf", action="store_true", help=argparse.SUPPRESS)
    add("--torch-compile", action="store_true", help="compile the model with torch.compile")
    return group


def add_checkpoint_args(parser: argparse.ArgumentParser) -> Any:
    """Saving and restoring."""
    group = parser.add_argument_group("Checkpointing")
    add = group.add_argument
    add("--save-dir", type=output_folder, metavar="DIR", default="checkpoints", help="folder for checkpoints")
    add("--restore-file", default="checkpoint_last.pt", metavar="FILE", help="checkpoint to start from")
    add("--finetune-from-model", metavar="FILE", help="start from these weights only, unless a last checkpoint exists")
    add("--reset-dataloader", action="store_true", help="do not restore the position in the data")
    add("--reset-lr-scheduler", action="store_true", help="do not restore the schedule")
    add("--reset-meters", action="store_true", help="do not restore meters")
    add("--reset-optimizer", action="store_true", help="do not restore the optimiser")
    add("--optimizer-overrides", default="{}", metavar="DICT", help="replaces optimiser settings on restoring")
    add("--save-interval", type=positive_int, default=1, metavar="N", help="save every N epochs")
    add(
        "--save-interval-updates",
        type=natural_int,
        default=0,
        metavar="N",
        help="save and validate every N updates too (default: only at ends of epochs)",
    )
    add(
        "--keep-interval-updates", type=any_int, default=-1, metavar="N", help="keep the last N of these (default: all)"
    )
    add(
        "--keep-last-epochs",
        type=any_int,
        default=-1,
        metavar="N",
        help="keep the last N checkpoints of epochs (default: all)",
    )
    add(
        "--keep-best-checkpoints",
        type=any_int,
        default=-1,
        metavar="N",
        help="keep the N best checkpoints besides (default: only the best)",
    )
    add("--no-save", action="store_true", help="save nothing")
    add("--no-epoch-checkpoints", action="store_true", help="only keep the last and the best checkpoint")
    add("--no-last-checkpoints", action="store_true", help="do not keep the last checkpoint")
    add("--no-save-optimizer-state", action="store_true", help="leave the optimiser out of checkpoints")
    add(
        "--best-checkpoint-metric",
        default="loss",
        metavar="NAME",
        help="quantity that decides which checkpoint is best",
    )
    add("--maximize-best-checkpoint-metric", action="store_true", help="the largest value is best")
    add(
        "--patience",
        type=any_int,
        default=-1,
        metavar="N",
        help="stop after more than N validations without progress (default: never)",
    )
    return group
