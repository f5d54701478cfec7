"""Encodes lines of raw text to the words or subwords of the dictionary, by the tokeniser and the sub-word encoder that
flags name. The hub interface uses the same objects, so that it splits a text in the same way as the training text."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from fairseq.data import encoders
from fairseq.errors import UserError
from fairseq.files.odd_characters import ENCODER_MARKS, UNKNOWN_WORDS, count_odd_characters


class TextEncoder:
    """Encodes whole lines of UTF-8. Whitespace at the ends of lines is removed, as without an encoder. The attribute
    `odd` counts occurrences of the encoder's marker in the raw text. Can be pickled, for worker processes."""

    def __init__(self, tokenizer: Any, bpe: Any) -> None:
        self.tokenizer, self.bpe = tokenizer, bpe

    @classmethod
    def build(cls, args: argparse.Namespace, lang: str | None = None) -> TextEncoder | None:
        """What `--tokenizer` and `--bpe` name, None where they name nothing; `lang` is the text's language."""
        target = getattr(args, "target_lang", None)
        if lang is not None and lang == target and lang != getattr(args, "source_lang", None):
            moses = getattr(args, "moses_target_lang", None) or target
            args = argparse.Namespace(**{**vars(args), "source_lang": target, "moses_source_lang": moses})
        tokenizer, bpe = encoders.build_tokenizer(args), encoders.build_bpe(args)
        return None if tokenizer is None and bpe is None else cls(tokenizer, bpe)

    def line(self, line: str, odd: Counter[str]) -> str:
        """One line, without its line end."""
        line = line.strip()
        if self.tokenizer is not None:
            line = self.tokenizer.encode(line)
        if self.bpe is not None:
            if found := getattr(self.bpe, "marks_in", lambda line: 0)(line):
                odd[ENCODER_MARKS] += found
            line = self.bpe.encode(line)
        if "\n" in line or "\r" in line:
            raise UserError("--tokenizer and --bpe: found a line end in an encoded line, expected one line a line")
        return line

    def encode(self, text: bytes, odd: Counter[str]) -> bytes:
        """Whole lines, each with its line end."""
        lines = text.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return "".join(f"{self.line(line, odd)}\n" for line in lines[:-1]).encode("utf-8", "surrogatepass")


def prepared(text: bytes, encoder: TextEncoder | None, odd: Counter[str]) -> bytes:
    """Whole lines as they are cut into words: through the encoder, if there is one. Odd characters are counted."""
    count_odd_characters(text, odd)
    if encoder is None:
        return text
    if unknown := text.count(b"<unk>"):
        odd[UNKNOWN_WORDS] += unknown
    return encoder.encode(text, odd)
