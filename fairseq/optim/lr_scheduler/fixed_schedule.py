"""One rate per epoch from the list of `--lr`, with an optional warm-up and a decay once `--force-anneal` is reached."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.flag_types import any_int, natural_float, natural_int
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler


def annealed(lrs: list[float], epoch: int, force_anneal: int | None, shrink: float) -> float:
    """The rate after `epoch` complete epochs: the next list entry (the last one repeats), or the annealed last one."""
    if force_anneal is None or epoch < force_anneal:
        return lrs[min(epoch, len(lrs) - 1)]
    return lrs[-1] * shrink ** (epoch + 1 - force_anneal)


@register_lr_scheduler("fixed")
class FixedSchedule(FairseqLRScheduler):
    """`--lr-scheduler fixed`."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.lr = args.lr[0]
        self.warmup = args.warmup_updates or 0
        self.factor = 1.0 / self.warmup if self.warmup > 0 else 1.0

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--force-anneal", "--fa", default=None, type=any_int, metavar="N", help="anneal from this epoch on")
        add("--lr-shrink", "--ls", default=0.1, type=natural_float, metavar="LS", help="factor per annealed epoch")
        add(
            "--warmup-updates", default=0, type=natural_int, metavar="N", help="linear warm-up over the first N updates"
        )

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        super().step(epoch, val_loss)
        self.lr = annealed(self.args.lr, epoch, self.args.force_anneal, self.args.lr_shrink)
        return self.set(self.factor * self.lr)

    def step_update(self, num_updates: int) -> float:
        self.factor = (num_updates + 1) / self.warmup if num_updates < self.warmup else 1.0
        return self.set(self.factor * self.lr)
