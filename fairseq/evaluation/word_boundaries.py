"""Which subwords form a word, for `--remove-bpe`: by a marker at the end of subwords that continue (`@@`), or by marks
where words begin or end (SentencePiece, GPT-2, letters). If no symbol of the dictionary has the mark, a warning says
so, and perplexity is per token."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.data.encoders.gpt2_bpe import JSON_FLAG, WORD_BEGIN, join_symbols, read_symbols
from fairseq.errors import BadFlag

logger = logging.getLogger(__name__)

FLAG = "--remove-bpe"
SENTENCEPIECE_MARK = "\u2581"
KNOWN = "'@@ ', subword_nmt, fastbpe, sentencepiece, gpt2, wordpiece, letter, _EOW or none"
ALIASES = {"subword_nmt": "@@", "fastbpe": "@@"}


@dataclass
class Boundaries:
    """Masks over the dictionary, (V,) bool each. goes_on: the word continues with the next token; None where words are
    found by the other two masks. begins: a word begins with this symbol; begins_after: a word begins with the token
    after this symbol. join: joins the symbols of a word to its text."""

    join: Callable[[Sequence[str]], str]
    goes_on: NDArray[np.bool_] | None = None
    begins: NDArray[np.bool_] | None = None
    begins_after: NDArray[np.bool_] | None = None

    def starts(self, tokens: NDArray[np.int64], preceding: int) -> NDArray[np.bool_]:
        """(T,) bool: whether a word begins at each of a sample's tokens (T,). preceding: the token before the first
        one, or -1 where it is unknown; the first token then begins a word."""
        assert self.begins is not None and self.begins_after is not None
        after = np.ones(len(tokens), bool)
        after[1:] = self.begins_after[tokens[:-1]]
        if preceding >= 0:
            after[0] = self.begins_after[preceding]
        return after | self.begins[tokens]


def check_encoder_flags(args: argparse.Namespace) -> None:
    """BadFlag for encoder flags that would have no effect. An evaluation reads token ids and encodes no text; it uses
    an encoder's flags only to find words."""
    mark = args.remove_bpe
    if getattr(args, "tokenizer", None):
        raise BadFlag("--tokenizer", args.tokenizer, "text that is tokenised already", "give it to preprocess.py")
    encoder = getattr(args, "bpe", None)
    if encoder and (mark is None or ALIASES.get(mark, mark).rstrip() != ALIASES.get(encoder, encoder)):
        raise BadFlag(
            "--bpe",
            f"{encoder} with {FLAG} {mark if mark is None else repr(mark)}",
            f"{FLAG} {encoder} beside it",
            "the text is encoded already; --bpe only tells how words are counted",
        )


def find_boundaries(dictionary: Any, mark: str | None, gpt2_encoder_json: str | None = None) -> Boundaries | None:
    """The word boundaries for `mark` (`--remove-bpe`) and this dictionary; None where no mark is given, or where no
    symbol of the dictionary has it (with a warning). BadFlag for an invalid mark."""
    if mark is None or mark == "none":
        return None
    symbols = [dictionary[index] for index in range(len(dictionary))]
    mark = ALIASES.get(mark, mark)
    boundaries = _by_beginnings(mark, symbols, gpt2_encoder_json)
    if boundaries is None:
        boundaries = _by_marker(mark, symbols)
    if not _marked(boundaries, len(symbols)):
        logger.warning(
            "%s %r joins nothing: no symbol of the dictionary has its mark%s; results are per token",
            FLAG,
            mark,
            _hint(symbols),
        )
        return None
    return boundaries


def _by_beginnings(mark: str, symbols: list[str], gpt2_encoder_json: str | None) -> Boundaries | None:
    """The boundaries of encoders that mark a word's beginning or its end; None for other marks."""
    special = np.array([index < 4 for index in range(len(symbols))])
    ends_line = np.array([index == 2 for index in range(len(symbols))])
    if mark in ("sentencepiece", "wordpiece"):
        sign = SENTENCEPIECE_MARK if mark == "sentencepiece" else "_"
        begins = np.array([symbol.startswith(sign) for symbol in symbols])
        return Boundaries(lambda pieces: "".join(pieces).removeprefix(sign), None, begins | special, ends_line)
    if mark == "gpt2":
        names = _gpt2_symbols(symbols, gpt2_encoder_json)
        begins = np.array([name.startswith(WORD_BEGIN) for name in names])
        of = dict(zip(symbols, names))
        return Boundaries(
            lambda pieces: join_symbols(of.get(piece, piece) for piece in pieces).removeprefix(" "),
            None,
            begins | special,
            ends_line,
        )
    if mark in ("letter", "_EOW"):
        sign = "|" if mark == "letter" else mark
        ends = np.array([symbol.endswith(sign) if mark == "_EOW" else symbol == sign for symbol in symbols])
        return Boundaries(lambda pieces: "".join(pieces).removesuffix(sign), None, ends_line, ends | ends_line)
    return None


def _by_marker(mark: str, symbols: list[str]) -> Boundaries:
    """fairseq's rule for any other mark: a word continues after a symbol that ends in the mark."""
    suffix = mark.rstrip()
    if not suffix or suffix.isalnum():
        raise BadFlag(FLAG, repr(mark), f"a marker at the end of pieces that go on, or one of {KNOWN}")
    goes_on = np.array([symbol.endswith(suffix) for symbol in symbols])
    goes_on[:4] = False
    if suffix != "@@" and suffix in symbols:  # a real one can be: "." would join the last word with the line's end
        logger.warning(
            "%s %r is a word of the dictionary, and %d symbols end in it; is it the marker of the encoded text?",
            FLAG,
            mark,
            goes_on.sum(),
        )
    return Boundaries(lambda pieces: "".join(piece.removesuffix(suffix) for piece in pieces), goes_on)


def _marked(boundaries: Boundaries, size: int) -> bool:
    """Whether any symbol except the special ones has the mark."""
    masks = (boundaries.goes_on, boundaries.begins, boundaries.begins_after)
    return any(mask is not None and mask[4:size].any() for mask in masks)


def _gpt2_symbols(symbols: list[str], path: str | None) -> list[str]:
    """The symbols in GPT-2's alphabet: the dictionary's symbols where it has them, else those that its ids stand for in
    the encoder's file."""
    if any(symbol.startswith(WORD_BEGIN) for symbol in symbols[4:]):
        return symbols
    if not path:
        raise BadFlag(FLAG, "gpt2 alone", f"--bpe gpt2 {JSON_FLAG} FILE beside it, which says where words begin")
    names = {str(number): symbol for symbol, number in read_symbols(path).items()}
    unknown = [s for s in symbols[4:] if s not in names and not s.startswith("madeupword") and s != "<mask>"]
    if unknown:
        found = f"{path}, which has no id {unknown[0][:40]!r} and {len(unknown) - 1} more of the dictionary's"
        raise BadFlag(JSON_FLAG, found, "the file that the text was encoded with")
    return [names.get(symbol, symbol) for symbol in symbols]


def _hint(symbols: list[str]) -> str:
    """A hint which mark the dictionary has, for a warning; empty if it has none."""
    signs = {
        "subword_nmt": lambda symbol: symbol.endswith("@@") and len(symbol) > 2,
        "sentencepiece": lambda symbol: symbol.startswith(SENTENCEPIECE_MARK),
        "gpt2": lambda symbol: symbol.startswith(WORD_BEGIN),
    }
    for name, has in signs.items():
        if sum(map(has, symbols)) > len(symbols) // 10:
            return f" (its pieces look like those of {name})"
    return ""
