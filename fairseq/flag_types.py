"""What a flag's text may say: the parser of every command, types for argparse, each of which refuses a wrong text with
what it found and expected, and literal dictionaries. Nothing typed on a command line is ever evaluated."""

from __future__ import annotations

import argparse
import ast
import math
import os
import tempfile
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn

from fairseq.errors import BadFlag, UserError
from fairseq.files.atomic_io import kind_of_node, name_problem
from fairseq.flag_help import HelpFormatter, Layout, format_help, short_usage
from fairseq.registry import FLAGS_OF_CLASSES, unknown_name

NO_LAYOUT = Layout({})
LARGEST = (1 << 31) - 1  # of counts; products of two of them fit 64 bits
MOST_ROWS = 1 << 48

MAY_BE_EMPTY = ("remove_bpe", "bpe_separator", "document_separator")  # their own checks say more


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with an error message of one line, with the help that `layout` describes, and
    without empty values: `--destdir ""` would be the current folder, `--srcdict ""` no dictionary."""

    def __init__(self, *args: Any, layout: Layout = NO_LAYOUT, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})
        self.layout = layout

    def format_usage(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage or short_usage(self, self.layout), [], [])
        return formatter.format_help()

    def format_help(self) -> str:
        return format_help(self, self.layout)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; UserError for a value that is empty, or blank, where the default is not."""
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            given = getattr(parsed, action.dest, None)
            if given == [] and action.nargs is None:  # what argparse makes of `--flag=--`
                raise BadFlag("/".join(action.option_strings), "--", "a value")
            if action.metavar == "DICT" or action.dest in MAY_BE_EMPTY:
                continue
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, str) and not value.strip() and value != action.default:
                    name = "/".join(action.option_strings) or action.dest
                    raise BadFlag(name, f"the empty value {value!r}", "a value", "leave the flag out otherwise")
        return parsed, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse does; UserError for the name of a class that is not registered."""
        flag = next(iter(FLAGS_OF_CLASSES.intersection(action.option_strings)), None)
        if flag is not None and action.choices is not None and value not in action.choices:
            raise unknown_name(flag, value, list(action.choices))
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


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


def output_name(text: str) -> str:
    """argparse type: a name, or the beginning of names, of files to write."""
    if problem := name_problem(text):
        raise argparse.ArgumentTypeError(f"found {problem}, expected the name of a file to write")
    return text


def output_folder(text: str) -> str:
    """argparse type: the name of a folder to write to."""
    if problem := name_problem(text, folder=True):
        raise argparse.ArgumentTypeError(f"found {problem}, expected the name of a folder")
    return text


def output_file(text: str) -> str:
    """argparse type: a file that a command writes in the end; whether it can is known in the beginning."""
    output_name(text)
    kind = kind_of_node(text)
    if kind is not None:
        found = f"{kind.replace('a ', 'the ', 1)} {text}"
        raise argparse.ArgumentTypeError(f"found {found}, expected the name of a file to write")
    folder = os.path.dirname(os.path.abspath(text))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        raise argparse.ArgumentTypeError(f"found {text!r}, but nothing can be written in {folder}") from None
    return text


def output_prefix(*suffixes: str) -> Callable[[str], str]:
    """argparse type: what the names of several files begin with, each an `output_file`."""

    def check(text: str) -> str:
        if not os.path.basename(text):
            expected = "a prefix for the names of files, such as results/sweep"
            raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")
        for suffix in suffixes:
            output_file(text + suffix)
        return text

    return check


def can_be_shown(character: str) -> bool:
    """Whether a figure or a table can have it: not line ends, control characters, and what is no text."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Cn", "Zl", "Zp")


def shown_text(text: str) -> str:
    """argparse type: text that a figure can show in a line."""
    if not all(map(can_be_shown, text)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a line of characters that can be printed")
    return text


def int_list(text: str) -> list[int]:
    """argparse type: "3" or "1,2,4" as a list of positive integers."""
    try:
        numbers = [int(word) for word in text.strip("[]() ").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or a list such as 1,2") from None
    if min(numbers) < 1 or max(numbers) > LARGEST:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers from 1 to {LARGEST}")
    return numbers


def rate_list(text: str) -> list[float]:
    """argparse type: "0.25" or "0.25,0.1" as a list of numbers of at least 0."""
    try:
        numbers = [float(word) for word in text.strip("[]() ").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number or a list such as 0.25,0.1") from None
    if not all(0 <= number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers of at least 0")
    return numbers


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return number


def _integer(text: str, least: int, most: int) -> int:
    bounded = f"an integer of at least {least}"
    number: int = _number(text, int, lambda _: True, "an integer" if least == -LARGEST else bounded)
    if number < least:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected {bounded}")
    if number > most:
        raise argparse.ArgumentTypeError(f"found {text[:40]}, expected an integer of at most {most}")
    return number


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1, as large as counts may be."""
    return _integer(text, 1, LARGEST)


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0, as large as counts may be."""
    return _integer(text, 0, LARGEST)


def any_int(text: str) -> int:
    """argparse type: an integer, of which negative ones mean something of their own (mostly: no limit)."""
    return _integer(text, -LARGEST, LARGEST)


def row_count(text: str) -> int:
    """argparse type: how many rows a datastore has; no disk holds more."""
    return _integer(text, 1, MOST_ROWS)


def seed_int(text: str) -> int:
    """argparse type: a seed that NumPy's and torch's generators take."""
    return _number(text, int, lambda number: 0 <= number < 1 << 32, f"an integer from 0 to {(1 << 32) - 1}")


def small_seed_int(text: str) -> int:
    """argparse type: a seed that FAISS takes too."""
    return _number(text, int, lambda number: 0 <= number < 1 << 31, f"an integer from 0 to {(1 << 31) - 1}")


def finite_float(text: str) -> float:
    """argparse type: a number."""
    return _number(text, float, math.isfinite, "a number")


def unit_float(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    return _number(text, float, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    return _number(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def natural_float(text: str) -> float:
    """argparse type: a number of at least 0."""
    return _number(text, float, lambda number: 0 <= number < math.inf, "a number of at least 0")
