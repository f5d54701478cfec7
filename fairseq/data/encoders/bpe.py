"""Sub-word encoders whose codes are those of subword-nmt and of fastBPE."""

from __future__ import annotations

import argparse
import io
from typing import Any

from fairseq.data.data_utils import post_process
from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.codes import FLAG, Codes, read_codes
from fairseq.data.encoders.files import optional_module
from fairseq.errors import BadFile, BadFlag
from fairseq.tokenizer import tokenize_line


@register_bpe("subword_nmt")
class SubwordNMTBPE:
    """BPE with a marker (`@@`) at the end of each subword that continues. Words are those of `tokenize_line`."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this encoder."""
        parser.add_argument("--bpe-codes", metavar="FILE", help="codes of subword-nmt or fastBPE")
        parser.add_argument("--bpe-separator", default="@@", metavar="SEP", help="marker of unfinished words")

    def __init__(self, args: argparse.Namespace) -> None:
        self.separator = getattr(args, "bpe_separator", None) or "@@"
        if self.separator.split() != [self.separator]:
            raise BadFlag("--bpe-separator", repr(self.separator), "a marker without whitespace, such as @@")
        apply_bpe = optional_module("subword_nmt.apply_bpe", "--bpe", "subword-nmt")
        path = getattr(args, "bpe_codes", None)
        self.bpe = apply_bpe.BPE(io.StringIO(self._checked(read_codes(path), path).text()), separator=self.separator)

    def _checked(self, codes: Codes, path: Any) -> Codes:
        """Refuses the codes of the other program, whose merges this one would not apply in the same way."""
        if codes.counted:
            found = "merges with counts, as fastBPE writes them"
            raise BadFile(path, found, "those of subword-nmt", "use --bpe fastbpe")
        return codes

    def encode(self, x: str) -> str:
        """Splits words into pieces."""
        return self.bpe.process_line(" ".join(tokenize_line(x)))

    def decode(self, x: str) -> str:
        """Joins pieces again."""
        return post_process(x, self.separator + " ")

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether a subword after `x` begins a word: subwords that continue have the marker."""
        return not x.endswith(self.separator)

    def marks_in(self, line: str) -> int:
        """How many words of the text end in the marker themselves, and look unfinished when encoded."""
        return sum(word.endswith(self.separator) for word in line.split()) if self.separator in line else 0


@register_bpe("fastbpe")
class FastBPE(SubwordNMTBPE):
    """The same encoding from a fastBPE codes file, whose merges carry counts and whose header is missing. Codes with
    subword-nmt's header are read too."""

    def _checked(self, codes: Codes, path: Any) -> Codes:
        if codes.version == "0.1":
            raise BadFile(path, "codes of subword-nmt's version 0.1", f"{FLAG} of fastBPE", "use --bpe subword_nmt")
        return codes
