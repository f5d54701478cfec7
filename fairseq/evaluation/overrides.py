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
from fairseq.registry import declared_actions
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
        if name in actions:
            _check_value(actions[name], name, value)
    key_type = overrides.get("knn_keytype")
    if key_type is not None and args.knn_keytype not in (None, key_type):
        raise BadFlag(FLAG, f"knn_keytype {key_type!r}", f"--knn-keytype {args.knn_keytype}, which is given too")
    args.knn_keytype = args.knn_keytype or key_type
    return overrides


def _actions() -> dict[str, argparse.Action]:
    """The flags that registered models and tasks declare, by name."""
    classes = dict.fromkeys([*ARCH_MODEL_REGISTRY.values(), *TASK_REGISTRY.values()])
    return {action.dest: action for cls in classes for action in declared_actions(cls)}


def _check_value(action: argparse.Action, name: str, value: Any) -> None:
    found = f"{name} {value!r}"
    if value is None:
        return
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise BadFlag(FLAG, found, "True or False")
        return
    if callable(action.type) and not isinstance(value, list | tuple | dict):
        try:
            action.type(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise BadFlag(FLAG, found, f"what {action.option_strings[0]} accepts ({error})") from None
    if action.choices is not None and value not in action.choices:
        raise BadFlag(FLAG, found, f"one of {', '.join(map(str, action.choices))}")


def warn_of_effectless(
    overrides: dict[str, Any], args: argparse.Namespace, stored: Collection[str], kept: Collection[str]
) -> None:
    """Warns of overrides without effect. stored: names of the options in the checkpoints; kept: names of options for
    which the checkpoint's value is used, not the command line's."""
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
