"""Checks of training flags that contradict each other: a training whose result would not be saved is refused, and a
warning names flags without effect."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from fairseq.errors import BadFlag

logger = logging.getLogger(__name__)

Condition = Callable[[argparse.Namespace], bool]

# When, the flag that has no effect, and why.
EFFECTLESS: list[tuple[Condition, str, str]] = [
    (lambda a: a.patience >= 0 and a.disable_validation, "--patience", "--disable-validation is given"),
    (
        lambda a: a.keep_best_checkpoints > 0 and a.disable_validation,
        "--keep-best-checkpoints",
        "--disable-validation leaves no value to compare",
    ),
    (
        lambda a: a.validate_interval_updates > 0 and a.disable_validation,
        "--validate-interval-updates",
        "--disable-validation is given",
    ),
    (
        lambda a: a.fixed_validation_seed is not None and a.disable_validation,
        "--fixed-validation-seed",
        "--disable-validation is given",
    ),
    (
        lambda a: a.lr_scheduler == "reduce_lr_on_plateau" and a.disable_validation,
        "--lr-scheduler reduce_lr_on_plateau",
        "--disable-validation leaves no loss to look at, so the rate never falls",
    ),
    (
        lambda a: a.keep_interval_updates > 0 and a.save_interval_updates <= 0,
        "--keep-interval-updates",
        "--save-interval-updates is not given",
    ),
    (
        lambda a: a.keep_last_epochs > 0 and a.no_epoch_checkpoints,
        "--keep-last-epochs",
        "--no-epoch-checkpoints is given",
    ),
    (lambda a: a.no_save and a.save_interval_updates > 0, "--save-interval-updates", "--no-save is given"),
]


def _nothing_saved(args: argparse.Namespace) -> bool:
    """Whether no checkpoint can ever be written with these flags."""
    given = args.no_epoch_checkpoints and args.no_last_checkpoints and args.disable_validation
    return given and not args.no_save and args.save_interval_updates <= 0


def check_training_flags(args: argparse.Namespace) -> None:
    """Warns of flags without effect; BadFlag for a training of which nothing would be saved."""
    if _holds(_nothing_saved, args):
        found = "it with --no-epoch-checkpoints and --disable-validation"
        raise BadFlag("--no-last-checkpoints", found, "something to save", "drop one, or say --no-save")
    for condition, flag, reason in EFFECTLESS:
        if _holds(condition, args):
            logger.warning("%s has no effect: %s", flag, reason)


def _holds(condition: Condition, args: Any) -> bool:
    """Programs that make their own Namespace may leave out flags; what is absent contradicts nothing."""
    try:
        return bool(condition(args))
    except AttributeError:
        return False
