"""Cosine annealing with warm restarts (Loshchilov and Hutter, 2017), the schedule of the WikiText-103 recipe.

Two spellings are accepted. With `--max-lr`: `--lr` is the smallest rate and `--max-lr` the peak. Without it: `--lr` is
the peak and `--min-lr` the smallest rate, as later versions of fairseq read them."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fairseq.errors import BadFlag
from fairseq.flag_types import finite_float, natural_float, natural_int, positive_float
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import linear


@register_lr_scheduler("cosine")
class CosineSchedule(FairseqLRScheduler):
    """lr = m + (M - m)(1 + cos(pi t / T)) / 2 within a period of T updates, m and M shrinking from period to period."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        lr = self.single_lr()
        if args.max_lr is None:
            self.max_lr, self.min_lr = lr, min(max(args.min_lr, 0.0), lr)
            start = self.min_lr
        else:
            self.max_lr, self.min_lr, start = args.max_lr, lr, lr
        if self.max_lr <= self.min_lr:
            raise BadFlag("--max-lr", self.max_lr, f"more than the smallest rate {self.min_lr} (--lr)")
        self.warmup_init_lr = args.warmup_init_lr if args.warmup_init_lr >= 0 else start
        self.warmup, self.t_mult, self.shrink = args.warmup_updates, args.t_mult, args.lr_shrink
        self.period = args.lr_period_updates
        if self.period <= 0:
            self.period = args.max_update - self.warmup
            if self.period <= 0:
                limit = f"fewer than --max-update {args.max_update}" if args.max_update else "--max-update beside it"
                raise BadFlag("--warmup-updates", self.warmup, limit, "or give --lr-period-updates")

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add(
            "--warmup-updates", default=0, type=natural_int, metavar="N", help="linear warm-up over the first N updates"
        )
        add(
            "--warmup-init-lr",
            default=-1.0,
            type=finite_float,
            metavar="LR",
            help="rate at the start of the warm-up (default: the lowest rate)",
        )
        add(
            "--max-lr",
            default=None,
            type=positive_float,
            metavar="LR",
            help="peak rate, above --lr (default: --lr is the peak)",
        )
        add(
            "--t-mult",
            default=1.0,
            type=positive_float,
            metavar="M",
            help="factor by which each period outlasts the last",
        )
        add(
            "--lr-period-updates",
            default=-1.0,
            type=finite_float,
            metavar="N",
            help="updates in the first period (default: all after the warm-up)",
        )
        add(
            "--lr-shrink",
            default=0.1,
            type=natural_float,
            metavar="LS",
            help="factor on both rates from period to period",
        )

    def step_update(self, num_updates: int) -> float:
        if num_updates < self.warmup:
            return self.set(linear(self.warmup_init_lr, self.max_lr, num_updates, self.warmup))
        current = num_updates - self.warmup
        if self.t_mult != 1:
            q = self.t_mult
            i = math.floor(math.log(1 - current / self.period * (1 - q), q))
            length = q**i * self.period
            t = current - (1 - q**i) / (1 - q) * self.period
        else:
            i, length = math.floor(current / self.period), self.period
            t = current - self.period * i
        shrink = self.shrink**i
        low, high = self.min_lr * shrink, self.max_lr * shrink
        return self.set(low + 0.5 * (high - low) * (1 + math.cos(math.pi * t / length)))
