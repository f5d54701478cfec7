"""What `--help` shows: few lines of usage, an example, and the flags in groups by what a user is doing.

Flags are declared in many places (a command, its task, the chosen optimiser, a strategy), and some do nothing in some
commands. So the groups of a command are a table, a `Layout`, that names flags wherever they were declared. A flag that
no table names, such as one of an extension, stays in the group in which it was declared."""

from __future__ import annotations

import argparse
import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHOICES_BESIDE = 24  # characters up to which a flag's choices stand beside its name; longer ones in its text
TYPE_METAVARS = (("int", "N"), ("row_count", "N"), ("float", "X"))
COMPATIBILITY = "Accepted for compatibility"
BEFORE_FLAGS = re.compile(r' (?=--[^"]*(?:"[^"]*"[^"]*)*$)')  # but not inside quotes
UNNAMED = {"options", "optional arguments", "positional arguments"}  # argparse's own titles


@dataclass(frozen=True)
class Layout:
    """The help of one command.

    groups: title -> names of flags and positionals, separated by spaces, in the order of the help.
    hidden: flags that are accepted without an effect in this command; where one of them chooses a class, the flags of
      that class are hidden too.
    accepted: flags that only other programs or versions use; they come last, without their defaults.
    texts: flag -> help text that differs from the declared one, with its default where that matters.
    needs: flags that the usage names although argparse does not require them.
    example: a command line, in which %(prog)s is the program."""

    groups: Mapping[str, str]
    hidden: str = ""
    accepted: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    example: str = ""

    def title_of(self, action: argparse.Action) -> str | None:
        """The group that names this flag."""
        names = _names(action)
        return next((title for title, flags in self.titles().items() if names & set(flags.split())), None)

    def titles(self) -> dict[str, str]:
        """All groups in order, with their flags."""
        return {**self.groups, COMPATIBILITY: self.accepted}

    def hides(self, action: argparse.Action, declared_in: str | None) -> bool:
        """Whether the flag, declared in the group of this title, has no effect in the command."""
        flags = set(self.hidden.split())
        return bool(_names(action) & flags) or any(_is_title_of(declared_in, flag) for flag in flags)

    def text_of(self, action: argparse.Action) -> str | None:
        """The help text that replaces the declared one."""
        return next((text for flag, text in self.texts.items() if flag in _names(action)), None)


def _names(action: argparse.Action) -> set[str]:
    return set(action.option_strings) or {action.dest}


def title_of_choice(flag: str, choice: str) -> str:
    """The title over the flags that a chosen class adds: `title_of_choice("--optimizer", "adam")`."""
    return f"Flags of {flag} {choice}"


def _is_title_of(title: str | None, flag: str) -> bool:
    return title is not None and title.startswith(title_of_choice(flag, ""))


@contextlib.contextmanager
def flags_under(parser: argparse.ArgumentParser, title: str) -> Iterator[None]:
    """Flags that are added to the parser itself inside this block have a group of this title in the help."""
    before = set(map(id, parser._actions))
    yield
    own = parser._optionals._group_actions
    added = [action for action in own if id(action) not in before]
    if added:
        group = parser.add_argument_group(title)
        group._group_actions.extend(added)
        own[:] = [action for action in own if id(action) in before]


def sections(parser: argparse.ArgumentParser, layout: Layout) -> list[tuple[str, list[argparse.Action]]]:
    """(title, shown flags) of each group in order: the layout's, then those in which the others were declared; flags
    that nothing names come last."""
    titles = layout.titles()
    shown: dict[str, list[argparse.Action]] = {title: [] for title in layout.groups}
    unnamed: list[argparse.Action] = []
    for group in parser._action_groups:
        title = None if group.title in UNNAMED else group.title
        for action in group._group_actions:
            place = layout.title_of(action)
            if action.help is argparse.SUPPRESS or (place is None and layout.hides(action, title)):
                continue
            if place is None and title is None:
                unnamed.append(action)
            else:
                shown.setdefault(place or title or "", []).append(action)
    for title, actions in shown.items():
        actions.sort(key=lambda action: _rank(action, titles.get(title, "").split()))
    shown.setdefault("Other flags" if any(shown.values()) else "Flags", []).extend(unnamed)
    shown[COMPATIBILITY] = shown.pop(COMPATIBILITY, [])
    return [(title, actions) for title, actions in shown.items() if actions]


def _rank(action: argparse.Action, order: Sequence[str]) -> int:
    return min((order.index(name) for name in _names(action) if name in order), default=len(order))


def short_usage(parser: argparse.ArgumentParser, layout: Layout) -> str:
    """The program with what it cannot do without: `kmeans.py --dstore PREFIX [flags]`."""
    words, also = ["%(prog)s"], set(layout.needs.split())
    needed = [action for action in parser._actions if action.required or _names(action) & also]
    formatter: Any = parser._get_formatter()
    for action in sorted(needed, key=lambda action: bool(action.option_strings)):
        if action.option_strings:
            words += [_shown_names(action.option_strings)[0], formatter._format_args(action, formatter.metavar(action))]
        else:
            words.append(formatter._format_args(action, str(action.metavar or action.dest)))
    return " ".join([*words, "[flags]"])


def format_help(parser: argparse.ArgumentParser, layout: Layout) -> str:
    """The whole text of `--help`."""
    formatter: Any = parser._get_formatter()
    formatter.layout = layout
    formatter.add_usage(parser.usage or short_usage(parser, layout), [], [])
    formatter.add_text(parser.description)
    if layout.example:
        formatter.start_section("Example")
        runner = "python " if parser.prog.endswith(".py") else ""
        formatter.add_text(_on_lines(layout.example.replace("%(prog)s", runner + parser.prog), formatter._width))
        formatter.end_section()
    for title, actions in sections(parser, layout):
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def _on_lines(command: str, width: int) -> str:
    """A command on lines of a shell, indented, broken before flags only."""
    lines = [""]
    for part in re.split(BEFORE_FLAGS, command):
        if lines[-1] and len(f"{lines[-1]} {part}") > width - 6:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return "  " + " \\\n    ".join(lines)


def default_text(action: argparse.Action, text: str) -> str:
    """ " (default: 8)" behind a text that says nothing of a default which is worth saying; else nothing."""
    default = action.default
    if default in (None, argparse.SUPPRESS, "", "{}", [], ()) or action.nargs == 0 or not action.option_strings:
        return ""
    if re.search(r"\bdefaults?\b", text):
        return ""
    if isinstance(default, list | tuple):
        default = (" " if action.nargs else ",").join(map(_value_text, default))
    default = _value_text(default)
    return f" (default: {default})".replace("%", "%%")


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown_names(flags: Sequence[str]) -> list[str]:
    """Names of a flag without those that only spell it with underscores."""
    dashed = {flag for flag in flags if "_" not in flag}
    return [flag for flag in flags if "_" not in flag or flag.replace("_", "-") not in dashed]


class HelpFormatter(argparse.HelpFormatter):
    """Flags with their aliases before one value name, choices that are many in the text, defaults where they tell
    something, and descriptions in paragraphs, of which indented lines stay as they are."""

    layout = Layout({})

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **kwargs})

    def metavar(self, action: argparse.Action) -> str:
        """The name of a flag's value: N for integers, X for other numbers."""
        kind = getattr(action.type, "__name__", "")
        return next((name for part, name in TYPE_METAVARS if part in kind), action.dest.rpartition("_")[2].upper())

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return self.metavar(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.metavar is None and action.choices is not None and self._choices_in_text(action):
            return lambda size: (self.metavar(action),) * size
        return super()._metavar_formatter(action, default_metavar)

    def _choices_in_text(self, action: argparse.Action) -> bool:
        return action.choices is not None and len(",".join(map(str, action.choices))) > CHOICES_BESIDE

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else " " + self._format_args(action, self.metavar(action))
        return ", ".join(_shown_names(action.option_strings)) + values

    def _get_help_string(self, action: argparse.Action) -> str:
        text = self.layout.text_of(action)
        if text is not None:
            return text
        text = action.help or ""
        if self._choices_in_text(action) and action.choices is not None:
            text += ": " + ", ".join(map(str, action.choices))
        if self.layout.title_of(action) == COMPATIBILITY:
            return text
        return text + default_text(action, text)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = []
        for paragraph in text.strip("\n").split("\n\n"):
            lines = paragraph.split("\n")
            raw = all(line.startswith("  ") for line in lines)
            text = " ".join(paragraph.split())
            parts.append("\n".join(lines) if raw else textwrap.fill(text, width, break_on_hyphens=False))
        return "\n\n".join(parts)
