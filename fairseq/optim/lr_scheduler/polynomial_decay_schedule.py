"""Polynomial decay to `--end-learning-rate` at `--total-num-update`, after a linear warm-up from 0."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.errors import BadFlag
from fairseq.flag_types import any_int, finite_float, natural_float, natural_int, positive_int
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from fairseq.optim.lr_scheduler.fixed_schedule import annealed


@register_lr_scheduler("polynomial_decay")
class PolynomialDecaySchedule(FairseqLRScheduler):
    """n <= W: lr n / W; then (lr - end) (1 - (n - W) / (total - W))^power + end; from `total` on: end."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.lr, self.warmup, self.total = args.lr[0], args.warmup_updates or 0, args.total_num_update
        self.num_updates = 0
        if self.total <= self.warmup:
            raise BadFlag("--total-num-update", self.total, f"more than --warmup-updates {self.warmup}")

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--force-anneal", "--fa", default=None, type=any_int, metavar="N", help="ignore --lr's list from here on")
        add(
            "--warmup-updates", default=0, type=natural_int, metavar="N", help="linear warm-up over the first N updates"
        )
        add("--end-learning-rate", default=0.0, type=natural_float, metavar="LR", help="rate at the end")
        add("--power", default=1.0, type=finite_float, metavar="P", help="exponent of the decay")
        add(
            "--total-num-update",
            default=1000000,
            type=positive_int,
            metavar="N",
            help="update at which the end is reached",
        )

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        super().step(epoch, val_loss)
        if self.args.force_anneal is None or epoch < self.args.force_anneal:
            self.lr = annealed(self.args.lr, epoch, None, 1.0)
        return self.step_update(self.num_updates)

    def step_update(self, num_updates: int) -> float:
        self.num_updates = num_updates
        if self.warmup > 0 and num_updates <= self.warmup:
            return self.set(self.lr * num_updates / self.warmup)
        end = self.args.end_learning_rate
        if num_updates >= self.total:
            return self.set(end)
        left = 1 - (num_updates - self.warmup) / (self.total - self.warmup)
        return self.set((self.lr - end) * left**self.args.power + end)
