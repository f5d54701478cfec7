"""Decay with the inverse square root of the update number after a linear warm-up (Vaswani et al., 2017)."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.errors import BadFlag
from fairseq.flag_types import finite_float, natural_int
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import linear


@register_lr_scheduler("inverse_sqrt")
class InverseSquareRootSchedule(FairseqLRScheduler):
    """n < W: linear from `--warmup-init-lr` to lr; after it lr sqrt(W / n)."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.lr, self.warmup = self.single_lr(), args.warmup_updates
        if self.warmup < 1:  # the formula has W under a root and in a fraction
            raise BadFlag("--warmup-updates", self.warmup, "at least 1 with --lr-scheduler inverse_sqrt")
        self.warmup_init_lr = max(args.warmup_init_lr, 0.0)

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add(
            "--warmup-updates",
            default=4000,
            type=natural_int,
            metavar="N",
            help="linear warm-up over the first N updates",
        )
        add(
            "--warmup-init-lr",
            default=-1.0,
            type=finite_float,
            metavar="LR",
            help="rate at the start of the warm-up (default: 0)",
        )

    def step_update(self, num_updates: int) -> float:
        if num_updates < self.warmup:
            return self.set(linear(self.warmup_init_lr, self.lr, num_updates, self.warmup))
        return self.set(self.lr * self.warmup**0.5 * num_updates**-0.5)
