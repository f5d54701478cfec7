"""The remedy in the message about a missing file, from the names in its folder: a similar name, the form of name that
another flag takes, or an unfinished job that would write the file."""

from __future__ import annotations

import difflib
import os

from fairseq.errors import MissingFile
from fairseq.files.inputs import regular_size

PARTS = ("_keys.npy", "_vals.npy", "_weights.npy", ".json")  # of a datastore, after its prefix
UNFINISHED = (".progress.json", ".tmp", ".trained", ".kmeans.tmp")
MOST_LISTED = 3
MOST_NAMES = 10_000  # largest number of names in a folder that are examined


def input_size(path: str, otherwise: str, prefix: str | None = None) -> int:
    """As `regular_size`; the sentence about a missing file says what is there instead, for a file of the datastore
    `prefix` or for the file itself, and `otherwise` what to do."""
    try:
        return regular_size(path)
    except MissingFile as error:
        remedy = remedy_for_file(path, otherwise) if prefix is None else remedy_for_prefix(prefix, otherwise)
        raise MissingFile(path, remedy) from error


def names_in(path: str) -> list[str]:
    """The names in the folder of `path`; none when it cannot be read."""
    try:
        with os.scandir(os.path.dirname(path) or ".") as entries:
            return [entry.name for entry, _ in zip(entries, range(MOST_NAMES), strict=False)]
    except OSError:
        return []


def remedy_for_file(path: str, otherwise: str) -> str:
    """The remedy for a missing file `path`; `otherwise`: what to do when nothing like it is there."""
    return _remedy(path, names_in(path), otherwise)


def remedy_for_prefix(prefix: str, otherwise: str) -> str:
    """The remedy for a datastore of which a file is missing, by its prefix."""
    for part in PARTS:
        if prefix.endswith(part) and os.path.exists(prefix):
            return f"give the prefix of its files, {prefix.removesuffix(part)}"
    names = names_in(prefix)
    prefixes = [name.removesuffix("_vals.npy") for name in names if name.endswith("_vals.npy")]
    if os.path.isdir(prefix):
        inside = names_in(os.path.join(prefix, ""))
        found = [os.path.join(prefix, name.removesuffix("_vals.npy")) for name in inside if name.endswith("_vals.npy")]
        if found:
            return f"this is a folder: give the prefix of files in it, {_listed(found)}"
    base = os.path.basename(prefix)
    parts = [name for name in names if name.startswith(base) and name.endswith(PARTS[:2])]
    if os.path.exists(prefix + "_vals.npy") and not os.path.exists(prefix + "_keys.npy"):
        return f"the values are there and the keys are not: {otherwise}"
    return _remedy(prefix, [*prefixes, *(name for name in names if name not in parts)], otherwise, prefixes)


def _remedy(path: str, names: list[str], otherwise: str, meant: list[str] | None = None) -> str:
    """The remedy for the missing `path` in a folder with `names`; meant: the names that may have been meant, by default
    all."""
    folder, base = os.path.split(path)
    if folder and not os.path.isdir(folder):
        return f"there is no folder {folder}: check the path"
    if any(name.startswith(base) and name.endswith(UNFINISHED) for name in names):
        return "an unfinished one exists: run the command that writes it again, which then continues"
    candidates = names if meant is None else meant
    forms = [name for name in candidates if base and name != base and name.startswith(base + ".")]
    near = forms or difflib.get_close_matches(base, candidates, MOST_LISTED, 0.75)
    if near:
        return f"there is {_listed([os.path.join(folder, name) for name in near])}; {otherwise}"
    return otherwise


def _listed(paths: list[str]) -> str:
    shown = sorted(paths)[:MOST_LISTED]
    return ", ".join(shown) + (f" and {len(paths) - len(shown)} more" if len(paths) > len(shown) else "")
