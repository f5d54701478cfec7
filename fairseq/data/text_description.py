"""The sidecar of a binarised split, `SPLIT.json`, which preprocess writes: digests of the split's files, and of the
words of its dictionary. Opening a split compares both, so that a flipped bit or another dictionary is detected. Splits
of fairseq have no sidecar and are not compared; fairseq ignores the sidecar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from fairseq.data.dictionary import Dictionary
from fairseq.data.token_ids import DEFINITION, TokenIds
from fairseq.errors import BadFile
from fairseq.files.checksums import check_content, describe_content
from fairseq.files.sidecar import peek_sidecar, sidecar_path, write_sidecar
from fairseq.refusals import refuse

KIND = "text"
ENDINGS = {"data": ".bin", "index": ".idx", "text": "", "documents": ".documents.npy", "names": ".names.txt"}
COMPARED_WHOLE = 4 << 30  # bytes: reading so many takes seconds; of a larger file samples are compared


def text_files(path: str) -> dict[str, str]:
    """The files of the split at `path` (no extension), by their name in the sidecar."""
    files = {name: path + ending for name, ending in ENDINGS.items()}
    return {name: file for name, file in files.items() if os.path.isfile(file)}


def describe_text(path: str, dictionary: Any, more: Mapping[str, Any] | None = None) -> None:
    """Writes the sidecar of the split at `path`, whose files are whole, with `more` fields."""
    content = {name: describe_content(file) for name, file in text_files(path).items()}
    words = {"words": len(dictionary), "dictionary": _words(dictionary)}
    write_sidecar(path, KIND, {**words, "content": content, **(more or {})})


def _words(dictionary: Any, count: int | None = None) -> str:
    """Digest of the first `count` symbols in their order."""
    text = "\n".join(dictionary.symbols[:count])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def text_counts(path: str) -> dict[str, Any] | None:
    """What the sidecar of the split at `path` says of its text: documents, tokens, bytes, words, and how they were
    counted. None where it says nothing."""
    text = peek_sidecar(path).get("text")
    numbers = ("tokens", "bytes", "words", "split_words")
    known = isinstance(text, dict) and all(isinstance(text.get(name), int) for name in numbers)
    return text if known else None


def check_text(path: str, dictionary: Dictionary | None = None) -> None:
    """BadFile for a split that differs from its sidecar, or that was binarised with other words than those of
    `dictionary` (which may have further words at its end)."""
    sidecar = peek_sidecar(path)
    if sidecar.get("kind") != KIND:
        return
    content = sidecar.get("content")
    for name, file in text_files(path).items():
        digests = content.get(name) if isinstance(content, dict) else None
        remedy = f"copy it or preprocess again, or remove {sidecar_path(path)} if another program wrote it"
        check_content(file, digests, os.path.getsize(file) <= COMPARED_WHOLE, remedy)
    words = sidecar.get("words")
    if dictionary is not None and isinstance(words, int) and _words(dictionary, words) != sidecar.get("dictionary"):
        if isinstance(dictionary, TokenIds):
            found = f"a text of another tokenizer of {words} token ids"
            expected = f"one of the {len(dictionary)} token ids of {os.path.join(dictionary.folder, DEFINITION)}"
            remedy = "put the tokenizer's files back, or preprocess the text again with --hf-tokenizer"
        else:
            found = f"a text binarised with another dictionary of {words} words"
            expected = f"the {len(dictionary)} words of this dictionary, in their order"
            remedy = "use the dict.txt that was written with it, or preprocess the text again with --srcdict"
        refuse(BadFile(path, found, expected, remedy))
