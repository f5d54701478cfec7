"""The vocabulary of a text that a tokenizer of its own has cut into tokens: numbers that are the tokenizer's, with the
methods of `Dictionary` that datasets and scoring use. No number is set aside for padding, which is -1 here."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from fairseq.data.dictionary import Dictionary
from fairseq.errors import BadFile, MissingFile
from fairseq.files.inputs import open_input
from fairseq.files.sidecar import read_sidecar

NAME = "tokens"  # of the description, tokens.json, in a data folder
FOLDER = "tokenizer"  # the tokenizer's own files, beside it
KIND = "tokenizer"
DEFINITION = "tokenizer.json"


class TokenIds:
    """Token ids 0 to `len - 1`. tokenizer: a digest of the tokenizer; begin: the id of the token that stands before a
    text's first one, -1 where the tokenizer has none; folder: where the tokenizer's files are."""

    nspecial = 0
    value_bytes = 4  # of a datastore's values: int32, as in knn-transformers
    ends_lines = False  # what ends a document, if anything, is the tokenizer's affair

    def __init__(self, size: int, tokenizer: str, begin: int, folder: str) -> None:
        self.size, self.tokenizer, self.begin, self.folder = size, tokenizer, begin, folder

    @classmethod
    def load(cls, data: str) -> TokenIds:
        """The vocabulary of a data folder that `preprocess.py --hf-tokenizer` wrote."""
        types: dict[str, type] = {"size": int, "tokenizer": str}
        path = os.path.join(data, NAME)
        info = read_sidecar(path, KIND, types)
        if info is None:
            raise MissingFile(path + ".json", "copy the folder again, or preprocess the text again with --hf-tokenizer")
        begin = info.get("begin")
        known = isinstance(begin, int) and not isinstance(begin, bool) and 0 <= begin < info["size"]
        if begin is not None and not known:
            expected, remedy = f"a token id below {info['size']}, or null", "preprocess the text again"
            raise BadFile(path + ".json", f"{begin!r:.40} as begin", expected, remedy)
        return cls(info["size"], info["tokenizer"], -1 if begin is None else begin, os.path.join(data, FOLDER))

    @staticmethod
    def described_in(data: str) -> bool:
        """Whether a data folder has one."""
        return os.path.isfile(os.path.join(data, NAME + ".json"))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        return self.symbols[index]

    def pad(self) -> int:
        """What fills up rows: no token."""
        return -1

    def eos(self) -> int:
        """What stands before a text's first token: where fairseq has the end of the sentence before, the tokenizer's
        beginning of a text, or where it has none its end."""
        return self.begin

    bos = eos

    @property
    def count(self) -> list[int]:
        """How often each token is known to occur: not counted, so equally often."""
        return [1] * self.size

    @functools.cached_property
    def symbols(self) -> list[str]:
        """Each token as the tokenizer's file spells it; `<id N>` for numbers without one."""
        path = os.path.join(self.folder, DEFINITION)
        try:
            with open_input(path) as stream:
                content = json.loads(stream.read())
            known = content["model"]["vocab"]
            pairs = known.items() if isinstance(known, dict) else ((entry[0], i) for i, entry in enumerate(known))
            names = {number: text for text, number in pairs}
            names |= {token["id"]: token["content"] for token in content.get("added_tokens", ())}
        except (ValueError, KeyError, TypeError, IndexError):
            expected, remedy = "the file that preprocess copied", "preprocess the text again"
            raise BadFile(path, "no vocabulary", expected, remedy) from None
        return [str(names.get(number, f"<id {number}>")) for number in range(self.size)]


def open_vocabulary(data: str) -> Any:  # Dictionary | TokenIds, which share no base
    """What the numbers of a data folder's texts stand for: the words of its `dict.txt`, or the tokens of the tokenizer
    that made them."""
    path = os.path.join(data, "dict.txt")
    if os.path.exists(path):
        return Dictionary.load(path)
    if os.path.lexists(os.path.join(data, NAME + ".json")) or os.path.isdir(os.path.join(data, FOLDER)):
        return TokenIds.load(data)
    raise MissingFile(path, "give the folder that preprocess.py --only-source wrote")
