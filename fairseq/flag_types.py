"""What a flag's text may say: types for argparse, each of which refuses a wrong text with what it found and expected,
and literal dictionaries. Nothing typed on a command line is ever evaluated."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from fairseq.errors import BadFlag


def literal_dict(flag: str, text: str | dict[str, Any] | None) -> dict[str, Any]:
    """The dictionary that a flag such as `--model-overrides` spells as a Python literal. Nothing is evaluated."""
    if isinstance(text, dict):
        return text
    try:
        value = ast.literal_eval(text) if text else {}
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadFlag(flag, repr(text), "a dictionary such as \"{'knn_keytype': 'last_ffn_input'}\"")
    return value


def eval_bool(text: str | bool | None, default: bool = False) -> bool:
    """A truth value from "True", "1", "yes" and their opposites."""
    if text is None:
        return default
    return text if isinstance(text, bool) else text.strip().lower() in ("1", "true", "yes", "t", "y")


def int_list(text: str) -> list[int]:
    """argparse type: "3" or "1,2,4" as a list of positive integers."""
    try:
        numbers = [int(word) for word in text.strip("[]() ").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or a list such as 1,2") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers of at least 1")
    return numbers


def float_list(text: str) -> list[float]:
    """argparse type: "0.25" or "0.25,0.1" as a list of numbers."""
    try:
        return [float(word) for word in text.strip("[]() ").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or a list such as 0.25,0.1") from None


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer of at least 1")
    return number


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer of at least 0")
    return number


def unit_float(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 to 1")
    return number


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return number


def natural_float(text: str) -> float:
    """argparse type: a number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least 0")
    return number
