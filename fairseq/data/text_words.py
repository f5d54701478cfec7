"""Reads text as bytes and finds its words with array operations, one large piece at a time.

Words are separated by Unicode whitespace, lines end at `\\n`, `\\r\\n` or a lone `\\r` (Python's universal newlines):
U+0085 and U+2028 separate words but end no line. Offsets are in bytes, so that parts of a file never overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from fairseq.errors import BadFile
from fairseq.files.inputs import regular_size

PIECE = 1 << 19  # bytes: small enough that a piece's arrays stay in the cache
PADDING = 8  # bytes after the last word, so that words can be loaded eight bytes at a time

SPACE = 0x20
LINE_END = b"\n"
# One-byte whitespace becomes a space; the newline stays.
_BLANK = bytes(SPACE if byte in b"\t\v\f\x1c\x1d\x1e\x1f" else byte for byte in range(256))
# Whitespace of two and three bytes in UTF-8, as big-endian numbers.
_SPACES = {
    n: np.array([int.from_bytes(c.encode(), "big") for c in characters])
    for n, characters in (
        (2, "\x85\xa0"),
        (3, "\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))),
    )
}
_LEADS = sorted({int(code) >> 8 * (n - 1) for n, codes in _SPACES.items() for code in codes})


@dataclass
class Words:
    """The words of a piece of text. `buffer`: its bytes (uint8); word i is buffer[starts[i]:][:lengths[i]].

    A line end is the word `LINE_END`, which cannot occur in text."""

    buffer: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_list(cls, words: Sequence[bytes]) -> Words:
        """Given words, whatever bytes they consist of."""
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        buffer = np.frombuffer(b"".join(words) + bytes(PADDING), dtype=np.uint8)
        return cls(buffer, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def from_strings(cls, words: Sequence[str]) -> Words:
        """Given words as UTF-8."""
        text = "\n".join([*words, ""]).encode("utf-8", "surrogatepass")
        buffer = np.frombuffer(text + bytes(PADDING), dtype=np.uint8)
        ends = np.flatnonzero(buffer == LINE_END[0])
        if len(ends) != len(words):  # some hold line ends themselves
            return cls.from_list([word.encode("utf-8", "surrogatepass") for word in words])
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        return cls(buffer, starts, ends - starts)


def part_offsets(path: str, parts: int) -> list[int]:
    """Cuts a file into `parts` byte ranges that end at line ends: parts + 1 ascending offsets."""
    size = file_size(path)
    offsets = [0]
    with open(path, "rb") as stream:
        for k in range(1, parts):
            offsets.append(max(offsets[-1], _next_line(stream, size * k // parts)))
    return [*offsets, size]


def file_size(path: str) -> int:
    """Bytes of a text file; errors as `regular_size`."""
    return regular_size(path, "check --trainpref, --validpref and --testpref")


def _next_line(stream: BinaryIO, position: int) -> int:
    """Where the first line begins that starts after byte `position`."""
    stream.seek(position)
    while block := stream.read(1 << 16):
        ends = [i for i in (block.find(b"\n"), block.find(b"\r")) if i >= 0]
        if ends:
            end = position + min(ends) + 1
            stream.seek(end - 1)
            return end + 1 if stream.read(2) == b"\r\n" else end
        position += len(block)
    return position


def read_pieces(path: str, start: int = 0, end: int | None = None, whole_lines: bool = False) -> Iterator[bytes]:
    """The UTF-8 text in bytes [start, end) of a file, in pieces that cut no word, and with `whole_lines` no line.

    The last line gets its newline if it lacks one. BadFile names the offset of the first byte that is not UTF-8."""
    end = file_size(path) if end is None else end
    rest: list[bytes] = []
    with open(path, "rb") as stream:
        stream.seek(start)
        position = start
        while position < end:
            block = stream.read(min(PIECE, end - position))
            if not block:
                raise BadFile(path, f"its end at byte {position}", f"{end} bytes", "it changed while being read")
            position += len(block)
            if position >= end:
                cut = len(block)
            else:  # a carriage return in last place may be half of a line end
                cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1), -1 if whole_lines else block.rfind(b" ")) + 1
            if not cut:
                rest.append(block)
                continue
            text = b"".join([*rest, block[:cut]])
            rest = [block[cut:]]
            _check_utf8(text, path, position - len(rest[0]) - len(text))
            yield text if position < end or text[-1:] in (b"\n", b"\r") else text + b"\n"


def _check_utf8(text: bytes, path: str, offset: int) -> None:
    if text.isascii():
        return
    try:
        text.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{text[error.start]:02x} at offset {offset + error.start}, which is not UTF-8 ({error.reason})"
        raise BadFile(path, found, "UTF-8 text", "convert the file, for instance with iconv") from None


def split_words(text: bytes) -> Words:
    """Finds the words and line ends of valid UTF-8 text that ends at a word's end."""
    ascii_only = text.isascii()
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    spaced = text.translate(_BLANK).replace(b"\n", b" \n ")
    buffer = np.frombuffer(b"".join((b" ", spaced, b" ", bytes(PADDING))), dtype=np.uint8)
    if not ascii_only:
        buffer = _blank_wide_spaces(buffer)
    blank = buffer == SPACE
    # The text begins and ends blank, so changes alternate: word begins, word ends.
    changes = np.flatnonzero(blank[1:-PADDING] != blank[: -PADDING - 1])
    starts = changes[0::2] + 1
    return Words(buffer, starts, changes[1::2] + 1 - starts)


def _blank_wide_spaces(buffer: np.ndarray) -> np.ndarray:
    """Overwrites whitespace of several bytes by spaces, in a copy if there is any."""
    leading = buffer == _LEADS[0]
    for lead in _LEADS[1:]:
        leading |= buffer == lead
    at = np.flatnonzero(leading)
    if not len(at):
        return buffer
    code = buffer[at].astype(np.int64)
    copied = False
    for n in (2, 3):
        code = code << 8 | buffer[at + n - 1]
        hits = at[np.isin(code, _SPACES[n])]
        if len(hits):
            buffer = buffer if copied else buffer.copy()
            copied = True
            for k in range(n):
                buffer[hits + k] = SPACE
    return buffer
