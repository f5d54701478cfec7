"""Characters that are hardly ever intended in a text, and become tokens that look like others: byte order marks, NUL
bytes, zero-width spaces, carriage returns inside lines. fairseq keeps them in words; this package does the same, with a
warning. Text in another encoding than UTF-8 is refused."""

from __future__ import annotations

import codecs
import logging
from collections import Counter

from fairseq.errors import BadFile

logger = logging.getLogger(__name__)

HEAD = 1 << 16  # number of bytes from which another encoding is detected
# The four-byte marks come first: UTF-32's begins with UTF-16's.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
NUL, CARRIAGE_RETURN, MARK, ZERO_WIDTH = b"\0", b"\r", codecs.BOM_UTF8, "\u200b".encode()
MEANING = {
    "NUL bytes": "become part of words",
    "carriage returns that no line feed follows": "end lines",
    "byte order marks (U+FEFF)": "become part of words",
    "zero-width spaces (U+200B)": "become part of words",
    "places with the marker of --bpe": "look like the marks that encoding sets",
    "places with <unk>": "--tokenizer and --bpe cut like any other text",
}
NULS, RETURNS, MARKS, ZERO_WIDTHS, ENCODER_MARKS, UNKNOWN_WORDS = MEANING


def begins_with_mark(path: str) -> bool:
    """Whether a file begins with UTF-8's byte order mark."""
    with open(path, "rb") as stream:
        return stream.read(len(MARK)) == MARK


def refuse_other_encodings(path: str) -> None:
    """BadFile when the first bytes of a file show UTF-16, UTF-32 or binary data."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD)
    for mark, name in ENCODINGS:
        if head.startswith(mark):
            remedy = f"convert it, for instance with iconv -f {name.removesuffix('LE').removesuffix('BE')} -t UTF-8"
            raise BadFile(path, f"the byte order mark of {name}", "UTF-8 text", remedy)
    if NUL in head and (nuls := head.count(NUL)) > len(head) // 8:
        found = f"{nuls} NUL bytes among the first {len(head)}, as in UTF-16 or binary data"
        raise BadFile(path, found, "UTF-8 text", "convert the file, for instance with iconv")


def count_odd_characters(text: bytes, counts: Counter[str]) -> None:
    """Counts the characters of `MEANING` in a piece of UTF-8 text. Fast where there are none: one search for each."""
    if NUL in text:
        counts[NULS] += text.count(NUL)
    if CARRIAGE_RETURN in text and (alone := text.count(CARRIAGE_RETURN) - text.count(b"\r\n")):
        counts[RETURNS] += alone
    if text.isascii():
        return
    if MARK[:1] in text and (marks := text.count(MARK)):  # a byte that few languages need: found fast
        counts[MARKS] += marks
    if ZERO_WIDTH in text:
        counts[ZERO_WIDTHS] += text.count(ZERO_WIDTH)


def odd_sentences(counts: Counter[str]) -> list[str]:
    """The clauses of a warning, one per kind of character: "2 NUL bytes, which become part of words"."""
    return [f"{counts[kind]} {kind}, which {meaning}" for kind, meaning in MEANING.items() if counts[kind]]


def warn_of_odd_characters(name: str, text: str, lines: bool = True) -> None:
    """Warns of such characters in the text that a program passes as `name`. lines: whether line ends are looked at, so
    that carriage returns end lines; else they are spaces."""
    counts: Counter[str] = Counter()
    count_odd_characters(text.encode("utf-8", "surrogatepass"), counts)
    if not lines:
        del counts[RETURNS]
    for sentence in odd_sentences(counts):
        logger.warning("%s: found %s", name, sentence)
