"""Pieces of a SentencePiece model."""

from __future__ import annotations

import argparse
import re
from typing import Any

from fairseq.data.data_utils import post_process
from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.files import optional_module, read_bytes
from fairseq.errors import BadFile

FLAG = "--sentencepiece-vocab"
WHAT = "a SentencePiece model (the file .model, not .vocab)"
WORD_BEGIN = "\u2581"
ANY_SPACE = re.compile(r"\s")


@register_bpe("sentencepiece")
class SentencepieceBPE:
    """U+2581 marks the beginning of a word. Any whitespace counts as a space, as it does in text without an encoder."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this encoder: fairseq 0.9's name, and that of later versions."""
        parser.add_argument(FLAG, "--sentencepiece-model", metavar="FILE", help="SentencePiece model")

    def __init__(self, args: argparse.Namespace) -> None:
        sentencepiece = optional_module("sentencepiece", "--bpe sentencepiece", "sentencepiece")
        path = getattr(args, "sentencepiece_vocab", None) or getattr(args, "sentencepiece_model", None)
        content = read_bytes(path, FLAG, WHAT)
        assert path is not None
        self.path = path
        sentencepiece.set_min_log_level(3)  # its own lines on standard error say less than the sentence below
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError, OSError):
            raise BadFile(path, "something that SentencePiece cannot read", WHAT, f"give it with {FLAG}") from None

    def encode(self, x: str) -> str:
        """Splits text into pieces."""
        pieces = self.model.EncodeAsPieces(ANY_SPACE.sub(" ", x))
        encoded = " ".join(pieces)
        if len(encoded.split()) != len(pieces):
            odd = next(piece for piece in pieces if piece.split() != [piece])
            raise BadFile(self.path, f"the piece {odd!r}", "pieces without whitespace", "train it without such symbols")
        return encoded

    def decode(self, x: str) -> str:
        """Joins pieces again."""
        return post_process(x, "sentencepiece")

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether piece `x` begins a word; special symbols do."""
        return x in ("<unk>", "<s>", "</s>", "<pad>") or x.startswith(WORD_BEGIN)

    def marks_in(self, line: str) -> int:
        """How often the text holds U+2581 itself, which reads as a space when encoded."""
        return line.count(WORD_BEGIN)
