"""Checks of option values that no command line gave (stored in a checkpoint, or passed as overrides) by the flags of
the same names: a value is accepted if the flag could have given it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from fairseq.flag_types import positive_int, unit_float
from fairseq.registry import declared_actions

PLAIN_TYPES = (int, float, str)
# Options of older versions, which are converted into flags of today.
OLD_SWITCHES = ("no_tie_adaptive_proj", "decoder_final_norm", "exclude_self_target", "raw_text", "lazy_load")
OLD_LENGTHS = ("max_positions", "max_source_positions")
OLD_FRACTIONS = ("relu_dropout",)


def actions_of(classes: Iterable[Any]) -> dict[str, argparse.Action]:
    """The flags that classes declare, by the names of their options."""
    return {action.dest: action for cls in dict.fromkeys(classes) for action in declared_actions(cls)}


def expected_instead(action: argparse.Action, value: Any) -> str | None:
    """What the flag of `action` accepts, if `value` is nothing that it could have given; None for a possible value.
    Types that a user's package defines are not called, and missing values (None) are not examined here."""
    flag = (action.option_strings or [action.dest])[0]
    if value is None or not action.option_strings:
        return None
    if action.nargs == 0:
        return None if isinstance(value, bool) else "True or False"
    if action.choices is not None:
        fits = any(type(value) is type(choice) and value == choice for choice in action.choices)
        return None if fits else f"one of {', '.join(map(str, action.choices))}"
    kind = action.type
    if kind is None or kind is str:
        parts = value if isinstance(value, list | tuple) else [value]  # a list that its text would spell
        number = all(type(part) in (int, float) for part in parts) and parts is value
        return None if isinstance(value, str) or number else f"a text, as {flag} accepts"
    if kind not in PLAIN_TYPES and not getattr(kind, "__module__", "").startswith("fairseq."):
        return None
    listed = isinstance(value, list | tuple)
    try:
        converted = kind(",".join(map(str, value)) if listed else str(value))  # type: ignore[operator]
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        return f"what {flag} accepts ({str(error)[:160]})"
    if isinstance(converted, str):
        return None if converted == value else f"a text, as {flag} accepts"
    same = converted == list(value) if listed else converted == value and not isinstance(value, bool)
    return None if same else f"a number, as {flag} accepts"


def old_options() -> dict[str, argparse.Action]:
    """The options of older versions, as flags."""
    parser = argparse.ArgumentParser(add_help=False)
    actions = [parser.add_argument("--" + name, action="store_true") for name in OLD_SWITCHES]
    actions += [parser.add_argument("--" + name, type=positive_int) for name in OLD_LENGTHS]
    actions += [parser.add_argument("--" + name, type=unit_float) for name in OLD_FRACTIONS]
    return {action.dest: action for action in actions}
