"""Tokenizers: opened from a model folder, told apart by what they do, and copied beside the text that they made."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
from typing import Any

from fairseq.data.token_ids import DEFINITION, FOLDER, KIND, NAME, TokenIds
from fairseq.errors import BadFile, MissingFile
from fairseq.files.atomic_io import atomic_write
from fairseq.files.sidecar import write_sidecar
from fairseq.models.huggingface.folders import (
    CONFIG,
    TOKENIZER_FILES,
    error_text,
    library,
    require_no_folder,
    require_regular_files,
    require_usable_config,
)
from fairseq.refusals import refuse

logger = logging.getLogger(__name__)

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NOT_TOKENIZERS = ("config.json", "generation_config.json", *INDEXES)
LIMIT = 64 << 20  # bytes of a file that can belong to a tokenizer


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder, as transformers opens it; UserError when there is none that can be opened."""
    require_regular_files(folder)
    require_no_folder(os.path.join(folder, DEFINITION))
    others = glob.glob(os.path.join(glob.escape(folder), "*.model"))
    if not others and not os.path.isfile(os.path.join(folder, DEFINITION)):
        raise MissingFile(os.path.join(folder, DEFINITION), "give a folder that holds a tokenizer")
    try:
        tokenizer = library().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a text")  # settings of wrong types show only now
    except Exception as error:
        logger.debug("%s: transformers cannot open its tokenizer", folder, exc_info=True)
        if os.path.isfile(os.path.join(folder, CONFIG)):
            require_usable_config(folder)
        found = f"a tokenizer that transformers cannot open ({error_text(error)})"
        raise BadFile(folder, found, "tokenizer.json", "copy the folder again") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        remedy = "save it again with a newer transformers"
        raise BadFile(folder, "a tokenizer without tokenizer.json", "one of the tokenizers library", remedy)
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a tokenizer does, whatever its files look like: equal for equal tokenizers."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # of the last call
        content.pop(setting, None)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = json.dumps([content, special], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def vocabulary_of(tokenizer: Any, folder: str) -> TokenIds:
    """Its token ids: up to the largest that it can give."""
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    begins = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    begin = next((number for number in begins if number is not None), -1)
    return TokenIds(size, tokenizer_digest(tokenizer), begin, folder)


def tokenizer_files(folder: str) -> list[str]:
    """The files of a folder that may belong to its tokenizer."""
    found = {path for pattern in TOKENIZER_FILES for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    return sorted(
        path for path in found if os.path.basename(path) not in NOT_TOKENIZERS and os.path.getsize(path) <= LIMIT
    )


def copy_tokenizer(folder: str, tokenizer: Any, data: str) -> TokenIds:
    """Puts the tokenizer's files and their description into the data folder `data`; gives its vocabulary there."""
    target = os.path.join(data, FOLDER)
    os.makedirs(target, exist_ok=True)
    for path in tokenizer_files(folder):
        with open(path, "rb") as source, atomic_write(os.path.join(target, os.path.basename(path))) as stream:
            shutil.copyfileobj(source, stream)
    vocabulary = vocabulary_of(tokenizer, target)
    begin = None if vocabulary.begin < 0 else vocabulary.begin
    fields = {"size": len(vocabulary), "tokenizer": vocabulary.tokenizer, "begin": begin}
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    write_sidecar(os.path.join(data, NAME), KIND, {**fields, **special})
    return vocabulary


def check_same_tokenizer(folder: str, dictionary: TokenIds, data: str) -> None:
    """Refuses a text that another tokenizer than the model's has made, where the model's folder has one."""
    require_no_folder(os.path.join(folder, DEFINITION))
    if not os.path.isfile(os.path.join(folder, DEFINITION)):
        logger.warning("%s has no %s: whether the text was made with its tokenizer is not known", folder, DEFINITION)
        return
    own = tokenizer_digest(open_tokenizer(folder))
    if own != dictionary.tokenizer:
        found = f"a text of the tokenizer {dictionary.tokenizer[:12]}"
        expected = f"{own[:12]}, the tokenizer of {folder}"
        refuse(BadFile(data, found, expected, f"preprocess it with --hf-tokenizer {folder}, or go on with --force"))
