"""BPE codes: the merges of subword-nmt and of fastBPE, one a line and the most frequent first.

subword-nmt writes `#version: 0.2` and lines of two symbols; its oldest form has no header, and the word's end is a
symbol of its own. fastBPE writes no header and a third field, the count. `</w>` ends the last symbol of a word."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.data.encoders.files import read_utf8
from fairseq.errors import BadFile

HEADER = "#version:"
VERSIONS = ("0.1", "0.2")
WORD_END = "</w>"
FLAG = "--bpe-codes"
WHAT = "BPE codes as subword-nmt or fastBPE write them"


@dataclass
class Codes:
    """Merges in order of priority; `version` "0.1" or "0.2" says how a word's end is written; `counted` whether each
    merge carries its count (fastBPE)."""

    merges: list[tuple[str, str]]
    version: str
    counted: bool

    def text(self) -> str:
        """The codes in subword-nmt's form, with its header."""
        return f"{HEADER} {self.version}\n" + "".join(f"{left} {right}\n" for left, right in self.merges)


def read_codes(path: str | None) -> Codes:
    """Reads and checks a codes file; BadFile names the line that is wrong."""
    lines = read_utf8(path, FLAG, WHAT).replace("\r\n", "\n").split("\n")
    assert path is not None
    if lines[-1] == "":
        lines.pop()
    version = _version(lines[0], path)
    fields = [line.split(" ") for line in (lines[1:] if version else lines)]
    first = 2 if version else 1
    width = len(fields[0]) if fields else 0
    counted = not version and width == 3
    for number, line in enumerate(fields, start=first):
        count_is_wrong = counted and len(line) == 3 and not (line[2].isascii() and line[2].isdigit())
        if len(line) != (3 if counted else 2) or not all(line) or count_is_wrong:
            found = f"{' '.join(line)[:80]!r} in line {number}"
            expected = "two symbols and their count" if counted else "two symbols separated by a space"
            raise BadFile(path, found, expected, f"give {WHAT}")
    if not fields:
        raise BadFile(path, "no merges", WHAT, f"give them with {FLAG}")
    merges = [(line[0], line[1]) for line in fields]
    bare_ends = any(right == WORD_END for _, right in merges)
    codes = Codes(merges, version or ("0.1" if bare_ends and not counted else "0.2"), counted)
    _check_reachable(codes, path, first)
    return codes


def _version(line: str, path: str) -> str | None:
    """The version in the header, None without a header."""
    if not line.startswith(HEADER):
        return None
    version = line.removeprefix(HEADER).strip()
    if version not in VERSIONS:
        raise BadFile(path, f"version {version!r:.40}", "version " + " or ".join(VERSIONS), f"give {WHAT}")
    return version


def _check_reachable(codes: Codes, path: str, first: int) -> None:
    """Each symbol of a merge is one character or the result of an earlier merge. Text of two words a line, lines in
    another order and lost lines are not like that."""
    made: set[str] = {WORD_END} if codes.version == "0.1" else set()
    for number, pair in enumerate(codes.merges, start=first):
        for symbol in pair:
            characters = symbol.removesuffix(WORD_END) if codes.version == "0.2" else symbol
            if len(characters) != 1 and symbol not in made:
                raise BadFile(
                    path,
                    f"{' '.join(pair)[:80]!r} in line {number}, where no earlier line makes {symbol[:40]!r}",
                    WHAT,
                    "the file is damaged or holds something else",
                )
        made.add("".join(pair))
