"""The rate shrinks when the validation loss stops improving (torch's ReduceLROnPlateau), with an optional warm-up."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fairseq.flag_types import finite_float, natural_float, natural_int
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import linear


@register_lr_scheduler("reduce_lr_on_plateau")
class ReduceLROnPlateau(FairseqLRScheduler):
    """`--lr-scheduler reduce_lr_on_plateau`: acts on epochs, not on updates (but for the warm-up)."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.lr, self.warmup = self.single_lr(), args.warmup_updates
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer.optimizer,
            mode="max" if args.maximize_best_checkpoint_metric else "min",
            patience=args.lr_patience,
            factor=args.lr_shrink,
            threshold=args.lr_threshold,
        )
        default_start = 0.0 if self.warmup > 0 else self.lr
        self.warmup_init_lr = args.warmup_init_lr if args.warmup_init_lr >= 0 else default_start
        self.warming_up = self.warmup > 0

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--lr-shrink", default=0.1, type=natural_float, metavar="LS", help="factor on a plateau")
        add(
            "--lr-threshold",
            default=1e-4,
            type=finite_float,
            metavar="LT",
            help="relative change that counts as progress",
        )
        add(
            "--lr-patience", default=0, type=natural_int, metavar="N", help="epochs without progress that are tolerated"
        )
        add(
            "--warmup-updates", default=0, type=natural_int, metavar="N", help="linear warm-up over the first N updates"
        )
        add(
            "--warmup-init-lr",
            default=-1.0,
            type=finite_float,
            metavar="LR",
            help="rate at the start of the warm-up (default: 0)",
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.plateau.best,
            "last_epoch": self.plateau.last_epoch,
            "num_bad_epochs": self.plateau.num_bad_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict.get("best")
        if self.best is not None:  # None: nothing was compared yet, and torch's own start stays
            self.plateau.best = self.best
        self.plateau.last_epoch = state_dict.get("last_epoch", self.plateau.last_epoch)
        self.plateau.num_bad_epochs = state_dict.get("num_bad_epochs", 0)

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        super().step(epoch, val_loss)
        if val_loss is not None and not self.warming_up:
            self.plateau.step(val_loss)
        else:
            self.plateau.last_epoch = epoch
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        if self.warmup > 0:
            if num_updates <= self.warmup:
                self.set(linear(self.warmup_init_lr, self.lr, num_updates, self.warmup))
            self.warming_up = num_updates < self.warmup
        elif num_updates == 0:
            self.set(self.lr)
        return self.optimizer.get_lr()
