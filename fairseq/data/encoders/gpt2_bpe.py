"""GPT-2's byte-level BPE: text becomes ids, written as decimal numbers separated by spaces.

`encoder.json` maps each byte sequence, written in GPT-2's alphabet of printable characters, to its id; `vocab.bpe`
holds the merges. Both are local files: nothing is downloaded. The library `tokenizers` does the work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any

from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.files import optional_module, read_json_object, read_utf8
from fairseq.errors import BadFile, UserError

JSON_FLAG = "--gpt2-encoder-json"
MERGES_FLAG = "--gpt2-vocab-bpe"
JSON_WHAT = "GPT-2's encoder.json: an object from symbols to ids"
MERGES_WHAT = "GPT-2's vocab.bpe: two symbols a line"
HEADER = "#version:"


def byte_alphabet() -> dict[str, int]:
    """The character that represents each byte in GPT-2's symbols: printable bytes are represented by themselves, the
    others, in order, by the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


ALPHABET = byte_alphabet()
WORD_BEGIN = next(character for character, byte in ALPHABET.items() if byte == 0x20)


def read_symbols(path: str | None) -> dict[str, int]:
    """Symbols and ids of an `encoder.json`, checked."""
    symbols = read_json_object(path, JSON_FLAG, JSON_WHAT)
    assert path is not None
    for symbol, number in symbols.items():
        if type(number) is not int or not 0 <= number < len(symbols):
            found, expected = f"{str(number)[:40]!r} for {symbol[:40]!r}", f"ids from 0 to {len(symbols) - 1}"
            raise BadFile(path, found, expected, f"give {JSON_WHAT}")
    if len(set(symbols.values())) != len(symbols):
        raise BadFile(path, "an id twice", "one id a symbol", f"give {JSON_WHAT}")
    missing = [f"0x{byte:02x}" for character, byte in ALPHABET.items() if character not in symbols]
    if missing:
        found = f"no symbol for {len(missing)} bytes ({missing[0]} for one)"
        raise BadFile(path, found, JSON_WHAT, "give another file")
    return symbols


def read_merges(path: str | None, symbols: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a `vocab.bpe`, checked against the symbols."""
    lines = read_utf8(path, MERGES_FLAG, MERGES_WHAT).replace("\r\n", "\n").split("\n")
    assert path is not None
    if lines[-1] == "":
        lines.pop()
    first = 2 if lines and lines[0].startswith(HEADER) else 1
    merges = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise BadFile(path, f"{line[:80]!r} in line {number}", "two symbols separated by a space", MERGES_WHAT)
        if not {pair[0], pair[1], pair[0] + pair[1]} <= symbols.keys():
            found = f"{line[:80]!r} in line {number}, which {JSON_FLAG} does not know"
            raise BadFile(path, found, MERGES_WHAT, "give two files that belong together")
        merges.append((pair[0], pair[1]))
    made = {left + right for left, right in merges}
    unmade = [symbol for symbol in symbols if len(symbol) > 1 and symbol not in made and set(symbol) <= ALPHABET.keys()]
    if len(unmade) > 1:  # one may be special: <|endoftext|>
        found = f"no merge that makes {unmade[0]!r} and {len(unmade) - 1} more symbols of {JSON_FLAG}"
        raise BadFile(path, found, MERGES_WHAT, "give two files that belong together")
    return merges


@register_bpe("gpt2")
class GPT2BPE:
    """Ids as words: `encode("Hello world")` is "15496 995" with GPT-2's own files."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Flags of this encoder."""
        parser.add_argument(JSON_FLAG, metavar="FILE", help="GPT-2's encoder.json (a local file)")
        parser.add_argument(MERGES_FLAG, metavar="FILE", help="GPT-2's vocab.bpe (a local file)")

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many processes there are
        tokenizers = optional_module("tokenizers", "--bpe gpt2", "tokenizers")
        self.symbols = read_symbols(getattr(args, "gpt2_encoder_json", None))
        merges = read_merges(getattr(args, "gpt2_vocab_bpe", None), self.symbols)
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=self.symbols, merges=merges))
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.names = {number: symbol for symbol, number in self.symbols.items()}

    def encode(self, x: str) -> str:
        """Text to ids."""
        return " ".join(map(str, self.bpe.encode(x, add_special_tokens=False).ids))

    def decode(self, x: str) -> str:
        """Ids to text. Words that are no ids, such as <unk> and <mask>, stay as they are."""
        return join_symbols(self._name(word) for word in x.split())

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether the piece with id `x` begins with a space."""
        return self._name(x).startswith(WORD_BEGIN)

    def marks_in(self, line: str) -> int:
        """Nothing in a text can be mistaken for what encoding adds."""
        return 0

    def _name(self, word: str) -> str:
        if word in ("<unk>", "<mask>", "<s>", "</s>", "<pad>") or word.startswith("madeupword"):
            return word
        if not (word.isascii() and word.isdigit()) or int(word) not in self.names:
            raise UserError(f"{word[:40]!r} is not an id of {JSON_FLAG}: the dictionary belongs to another vocabulary")
        return self.names[int(word)]


def join_symbols(symbols: Iterable[str]) -> str:
    """The text of symbols in GPT-2's alphabet; bytes that are no UTF-8 become U+FFFD."""
    raw = b"".join(
        bytes(ALPHABET[character] for character in symbol) if set(symbol) <= ALPHABET.keys() else symbol.encode()
        for symbol in symbols
    )
    return raw.decode("utf-8", "replace")
