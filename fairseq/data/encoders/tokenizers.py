"""Tokenisers: Moses' rules through sacremoses, plain whitespace, and NLTK's words."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from fairseq.data.encoders import register_tokenizer
from fairseq.data.encoders.files import optional_module
from fairseq.tokenizer import tokenize_line

logger = logging.getLogger(__name__)

WITHOUT_PREFIXES = ("ja", "ko", "cjk")  # languages that have rules of their own and no list of abbreviations


@register_tokenizer("moses")
class MosesTokenizer:
    """Moses tokenisation and detokenisation."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this tokeniser."""
        add = parser.add_argument
        add("--moses-source-lang", metavar="SRC", help="source language")
        add("--moses-target-lang", metavar="TARGET", help="target language")
        add("--moses-no-dash-splits", action="store_true", help="do not split at dashes")
        add("--moses-no-escape", action="store_true", help="do not escape special characters")

    def __init__(self, args: argparse.Namespace) -> None:
        sacremoses = optional_module("sacremoses", "--tokenizer moses", "sacremoses")
        source = getattr(args, "moses_source_lang", None) or getattr(args, "source_lang", None) or "en"
        target = getattr(args, "moses_target_lang", None) or getattr(args, "target_lang", None) or "en"
        self.dash_splits = not getattr(args, "moses_no_dash_splits", False)
        self.escape = not getattr(args, "moses_no_escape", False)
        known = {*sacremoses.corpus.NonbreakingPrefixes().available_langs.values(), *WITHOUT_PREFIXES}
        if source not in known:
            logger.warning(
                "--moses-source-lang: Moses has no abbreviations for %s and uses those of English; it has some for %s",
                source,
                ", ".join(sorted(known)),
            )
        self.tok = sacremoses.MosesTokenizer(source)
        self.detok = sacremoses.MosesDetokenizer(target)

    def encode(self, x: str) -> str:
        """Tokenises text."""
        return self.tok.tokenize(x, aggressive_dash_splits=self.dash_splits, return_str=True, escape=self.escape)

    def decode(self, x: str) -> str:
        """Joins tokens to text."""
        return self.detok.detokenize(x.split())


@register_tokenizer("space")
class SpaceTokenizer:
    """Whitespace as it is, normalised to single spaces."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def encode(self, x: str) -> str:
        """Runs of whitespace become one space."""
        return " ".join(tokenize_line(x))

    def decode(self, x: str) -> str:
        """Leaves the text alone."""
        return x


@register_tokenizer("nltk")
class NLTKTokenizer:
    """NLTK's word tokeniser."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.word_tokenize = optional_module("nltk.tokenize", "--tokenizer nltk", "nltk").word_tokenize

    def encode(self, x: str) -> str:
        """Tokenises text."""
        return " ".join(self.word_tokenize(x))

    def decode(self, x: str) -> str:
        """Leaves the tokens apart."""
        return x
