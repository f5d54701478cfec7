"""Prompts and continuations as text: through fairseq's dictionary, with the tokeniser and sub-word encoder that flags
name, or through a Hugging Face model's own tokenizer."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.data.dictionary import Dictionary
from fairseq.data.text_encoder import TextEncoder
from fairseq.data.token_ids import TokenIds
from fairseq.errors import BadFlag, UserError
from fairseq.files.odd_characters import RETURNS, count_odd_characters
from fairseq.generation.choice import Symbols

SURROGATE = re.compile("[\ud800-\udfff]")
SPECIAL = "special tokens, which prompts spell out or which replace unknown characters"


def checked_text(text: Any, as_unicode: bool = False) -> str:
    """The text that a program passes; UserError for what is no text, and with `as_unicode` for a lone surrogate (half a
    character of UTF-16), which no tokenizer reads."""
    if not isinstance(text, str):
        raise UserError(f"text: found {repr(text)[:80]}, expected a str; give a text")
    if as_unicode and (alone := SURROGATE.search(text)):
        found = f"the lone surrogate {alone[0]!r} at character {alone.start()}"
        raise UserError(f"text: found {found}, expected Unicode characters; decode the text again, or take it out")
    return text


class WordTexts:
    """Texts of a dictionary's words. odd: counts characters of the texts that are hardly ever intended."""

    def __init__(self, dictionary: Dictionary, args: argparse.Namespace) -> None:
        self.dictionary, self.encoder = dictionary, TextEncoder.build(args)
        self.start = dictionary.bos() if getattr(args, "add_bos_token", False) else dictionary.eos()
        self.symbols = Symbols((dictionary.eos(),), dictionary.pad(), dictionary.unk())
        self.odd: Counter[str] = Counter()

    def encode(self, text: str) -> Tensor:
        """Token ids (T,) int64 of a line, without an end."""
        text = checked_text(text)
        count_odd_characters(text.encode("utf-8", "surrogatepass"), self.odd)
        self.odd.pop(RETURNS, None)  # here a space
        line = " ".join(text.split()) if self.encoder is None else self.encoder.line(text.replace("\r", " "), self.odd)
        return self.dictionary.encode_line(line, add_if_not_exist=False, append_eos=False).long()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without its end."""
        text = str(self.dictionary.string(torch.tensor(list(tokens), dtype=torch.int64)))
        if self.encoder is not None and self.encoder.bpe is not None:
            text = self.encoder.bpe.decode(text)
        if self.encoder is not None and self.encoder.tokenizer is not None:
            text = self.encoder.tokenizer.decode(text)
        return text

    def name(self, token: int) -> str:
        """One token as the dictionary spells it."""
        return str(self.dictionary[token])


class TokenizerTexts:
    """Texts of a Hugging Face tokenizer. What stands before every text (BOS, or EOS where there is none) is not part of
    a prompt's tokens, even where the tokenizer itself puts it there."""

    def __init__(self, dictionary: TokenIds) -> None:
        from fairseq.models import huggingface  # transformers is there only with the extra `hf`

        self.tokenizer: Any = huggingface.open_tokenizer(dictionary.folder)
        self.start = dictionary.eos()
        self.special = frozenset(self.tokenizer.all_special_ids)
        end = self.tokenizer.eos_token_id
        self.symbols = Symbols(() if end is None else (int(end),))
        self.odd: Counter[str] = Counter()

    def encode(self, text: str) -> Tensor:
        """Token ids (T,) int64, without BOS and without an end; UserError for a lone surrogate."""
        text = checked_text(text, as_unicode=True)
        count_odd_characters(text.encode("utf-8", "surrogatepass"), self.odd)
        self.odd.pop(RETURNS, None)  # part of tokens, as any other character
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.odd[SPECIAL] += sum(token in self.special for token in tokens)
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def name(self, token: int) -> str:
        """One token's text."""
        return str(self.tokenizer.decode([token]))


def texts_of(dictionary: Dictionary | TokenIds, args: argparse.Namespace) -> WordTexts | TokenizerTexts:
    """For the dictionary of a data folder. args: flags of tokenisers and encoders, add_bos_token of the checkpoint;
    BadFlag for flags that cut words, with a tokenizer that does so itself."""
    if not isinstance(dictionary, TokenIds):
        return WordTexts(dictionary, args)
    for name in ("tokenizer", "bpe"):
        if (given := getattr(args, name, None)) is not None:
            raise BadFlag(f"--{name}", given, "nothing beside a Hugging Face model's own tokenizer", "drop it")
    return TokenizerTexts(dictionary)
