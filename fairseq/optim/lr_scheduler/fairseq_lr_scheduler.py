"""The interface of learning-rate schedules."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.errors import BadFlag
from fairseq.optim.fairseq_optimizer import FairseqOptimizer


class FairseqLRScheduler:
    """Base class. `step_update(n)` runs after each update and `step(epoch, val_loss)` after each epoch; both set the
    optimiser's rate and return it."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        self.args, self.optimizer = args, optimizer
        self.best: float | None = None

    @staticmethod
    def add_args(parser: Any) -> None:
        """Declares the schedule's own flags."""

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state for a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.best = state_dict.get("best")  # later versions of fairseq leave it out

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        """Sets the rate after `epoch` complete epochs, with the validation loss of the last one."""
        if val_loss is not None:
            self.best = val_loss if self.best is None else min(self.best, val_loss)
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        """Sets the rate of update `num_updates` + 1."""
        return self.optimizer.get_lr()

    def set(self, lr: float) -> float:
        """Sets the optimiser's rate and returns it."""
        self.optimizer.set_lr(lr)
        return lr

    def single_lr(self) -> float:
        """The one value of `--lr`; an error when a list was given."""
        if len(self.args.lr) > 1:
            raise BadFlag("--lr", self.args.lr, f"one value with --lr-scheduler {self.args.lr_scheduler}")
        return self.args.lr[0]


def linear(start: float, end: float, step: float, steps: float) -> float:
    """The value at `step` of `steps` on the way from `start` to `end`."""
    return start + step * (end - start) / steps
