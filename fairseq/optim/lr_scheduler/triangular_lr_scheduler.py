"""Triangular cycles between `--lr` and `--max-lr` (Smith, 2017: cyclical learning rates)."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.errors import BadFlag
from fairseq.flag_types import finite_float, natural_float, positive_float
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler


@register_lr_scheduler("triangular")
class TriangularSchedule(FairseqLRScheduler):
    """Up for half a period and down again; the peak (with `--shrink-min` also the foot) shrinks from cycle to cycle."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.min_lr, self.max_lr = self.single_lr(), args.max_lr
        if self.max_lr is None or self.max_lr <= self.min_lr:
            raise BadFlag("--max-lr", self.max_lr, f"more than --lr {self.min_lr}")
        if args.lr_period_updates < 2:
            raise BadFlag("--lr-period-updates", args.lr_period_updates, "at least 2")

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--max-lr", default=None, type=positive_float, metavar="LR", help="peak rate, above --lr")
        add("--lr-period-updates", default=5000.0, type=finite_float, metavar="N", help="updates in a cycle")
        add("--lr-shrink", default=0.1, type=natural_float, metavar="LS", help="factor from cycle to cycle")
        add("--shrink-min", action="store_true", help="shrink the smallest rate too")

    def step_update(self, num_updates: int) -> float:
        half = self.args.lr_period_updates // 2
        cycle = num_updates // (2 * half)
        shrink = self.args.lr_shrink**cycle
        low = self.min_lr * shrink if self.args.shrink_min else self.min_lr
        high = self.max_lr * shrink
        height = 1 - abs(num_updates / half - 2 * cycle - 1)
        return self.set(low + (high - low) * max(0.0, height))
