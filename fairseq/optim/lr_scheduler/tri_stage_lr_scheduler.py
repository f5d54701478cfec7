"""Warm-up, plateau and exponential decay (Park et al., 2019: SpecAugment)."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fairseq.flag_types import natural_float, natural_int, positive_float
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import linear


@register_lr_scheduler("tri_stage")
class TriStageLRSchedule(FairseqLRScheduler):
    """Linear from init-scale x lr to lr, lr for the hold steps, exponential to final-scale x lr, constant after it."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.peak = self.single_lr()

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--warmup-steps", default=4000, type=natural_int, metavar="N", help="updates of the linear warm-up")
        add("--hold-steps", default=20000, type=natural_int, metavar="N", help="updates at the peak")
        add("--decay-steps", default=60000, type=natural_int, metavar="N", help="updates of the decay")
        add("--init-lr-scale", default=0.01, type=natural_float, help="first rate, as a share of the peak")
        add("--final-lr-scale", default=0.01, type=positive_float, help="last rate, as a share of the peak")

    def step_update(self, num_updates: int) -> float:
        args, n = self.args, num_updates
        if n < args.warmup_steps:
            return self.set(linear(args.init_lr_scale * self.peak, self.peak, n, args.warmup_steps))
        n -= args.warmup_steps
        if n < args.hold_steps:
            return self.set(self.peak)
        n -= args.hold_steps
        if n <= args.decay_steps and args.decay_steps > 0:
            return self.set(self.peak * math.exp(math.log(args.final_lr_scale) * n / args.decay_steps))
        return self.set(self.peak * args.final_lr_scale)
