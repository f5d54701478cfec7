"""Checks of `--model-overrides`: each value must be one that the flag of its name would accept. A warning names
overrides without effect: options that nothing reads, and options that the command line's value replaces."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection
from typing import Any

from fairseq.errors import BadFlag
from fairseq.flag_types import literal_dict
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.option_checks import actions_of, expected_instead
from fairseq.tasks import TASK_REGISTRY

logger = logging.getLogger(__name__)

FLAG = "--model-overrides"
READ_BY_MODEL = ("max_target_positions",)  # also a flag of the task, but it is the model that needs it


def read_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The dictionary of overrides, each value checked like the flag of its name. `knn_keytype` becomes the value of
    `--knn-keytype`; BadFlag where both are given and differ."""
    overrides = literal_dict(FLAG, args.model_overrides)
    actions = _actions()
    for name, value in overrides.items():
        if not isinstance(name, str):
            raise BadFlag(FLAG, repr(name), "names of options as keys")
        if name in actions and (expected := expected_instead(actions[name], value)) is not None:
            raise BadFlag(FLAG, f"{name} {value!r}", expected)
    key_type = overrides.get("knn_keytype")
    if key_type is not None and args.knn_keytype not in (None, key_type):
        raise BadFlag(FLAG, f"knn_keytype {key_type!r}", f"--knn-keytype {args.knn_keytype}, which is given too")
    args.knn_keytype = args.knn_keytype or key_type
    return overrides


def _actions() -> dict[str, argparse.Action]:
    """The flags that registered models and tasks declare, by name."""
    return actions_of([*ARCH_MODEL_REGISTRY.values(), *TASK_REGISTRY.values()])


def warn_of_effectless(
    overrides: dict[str, Any],
    args: argparse.Namespace,
    stored: Collection[str],
    kept: Collection[str],
    alone: Collection[str] | None = None,
) -> None:
    """Warns of overrides without effect. stored: names of the options in the checkpoints; kept: names of options for
    which the checkpoint's value is used, not the command line's; alone: the only names that count, of models without
    such options."""
    if alone is not None:
        for name in overrides:
            if name not in alone:
                said = "%s: %r has no effect with a Hugging Face model, of which only these can be replaced: %s"
                logger.warning(said, FLAG, name, ", ".join(alone))
        return
    options = {*stored, *_actions(), *vars(args)}
    for name, value in overrides.items():
        if name not in options:
            said = "%s: %r is not an option of the checkpoint, its model or its task: it has no effect"
            logger.warning(said, FLAG, name)
        elif name in vars(args) and name not in (*kept, *READ_BY_MODEL) and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            logger.warning(
                "%s: %s %r has no effect, the command line's %s counts (%s): give that flag instead",
                FLAG,
                name,
                value,
                flag,
                getattr(args, name),
            )
