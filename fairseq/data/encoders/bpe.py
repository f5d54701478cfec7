"""Sub-word encoders: BPE codes in the format of subword-nmt (which fastBPE shares), and SentencePiece models."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from fairseq.data.data_utils import post_process
from fairseq.data.encoders import register_bpe
from fairseq.errors import BadFlag, MissingDependency, MissingFile


def optional_module(name: str, flag: str, package: str) -> Any:
    """Imports a library that only `flag` needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(name, flag, f"pip install {package}") from error


def _required(path: str | None, flag: str) -> str:
    if path is None:
        raise BadFlag(flag, "nothing", "the path of a file")
    return path


@register_bpe("subword_nmt")
class SubwordNMTBPE:
    """BPE with a marker (`@@`) at the end of each piece that goes on."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this encoder."""
        parser.add_argument("--bpe-codes", metavar="FILE", help="subword-nmt codes")
        parser.add_argument("--bpe-separator", default="@@", metavar="SEP", help="marker of unfinished words")

    def __init__(self, args: argparse.Namespace) -> None:
        path = _required(getattr(args, "bpe_codes", None), "--bpe-codes")
        self.separator = getattr(args, "bpe_separator", "@@")
        apply_bpe = optional_module("subword_nmt.apply_bpe", "--bpe", "subword-nmt")
        try:
            with open(path, encoding="utf-8") as codes:
                self.bpe = apply_bpe.BPE(self._prepared(codes), separator=self.separator)
        except FileNotFoundError as error:
            raise MissingFile(path, "give the codes with --bpe-codes") from error

    def _prepared(self, codes: Any) -> Any:
        return codes

    def encode(self, x: str) -> str:
        """Splits words into pieces."""
        return self.bpe.process_line(x)

    def decode(self, x: str) -> str:
        """Joins pieces again."""
        return post_process(x, self.separator + " ")

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether a piece that follows `x` begins a word: pieces that go on carry the marker."""
        return not x.endswith(self.separator)


@register_bpe("fastbpe")
class FastBPE(SubwordNMTBPE):
    """The same encoding from a fastBPE codes file, whose merges carry counts and whose header is missing."""

    def _prepared(self, codes: Any) -> Any:
        import io

        merges = [line.split() for line in codes if line.strip() and not line.startswith("#version")]
        return io.StringIO("#version: 0.2\n" + "".join(f"{merge[0]} {merge[1]}\n" for merge in merges))


@register_bpe("sentencepiece")
class SentencepieceBPE:
    """Pieces of a SentencePiece model; U+2581 marks the beginning of a word."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this encoder."""
        parser.add_argument("--sentencepiece-vocab", metavar="FILE", help="SentencePiece model")

    def __init__(self, args: argparse.Namespace) -> None:
        path = _required(
            getattr(args, "sentencepiece_vocab", None) or getattr(args, "sentencepiece_model", None),
            "--sentencepiece-vocab",
        )
        sentencepiece = optional_module("sentencepiece", "--bpe sentencepiece", "sentencepiece")
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.Load(path)
        except (OSError, RuntimeError) as error:
            raise MissingFile(path, "give the model with --sentencepiece-vocab") from error

    def encode(self, x: str) -> str:
        """Splits text into pieces."""
        return " ".join(self.model.EncodeAsPieces(x))

    def decode(self, x: str) -> str:
        """Joins pieces again."""
        return post_process(x, "sentencepiece")

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether piece `x` begins a word; special symbols do."""
        return x in ("<unk>", "<s>", "</s>", "<pad>") or x.startswith("\u2581")
