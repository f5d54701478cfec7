"""Flags of Hugging Face models and tokenizers, and of windows as that community cuts texts."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.flag_types import positive_int
from fairseq.models.huggingface import DOCUMENTS, DTYPES


def add_tokenizer_args(group: Any) -> None:
    """What `preprocess.py` takes."""
    add = group.add_argument
    add("--hf-tokenizer", metavar="MODEL", help="cut texts into tokens by the tokenizer of this Hugging Face model")
    add("--hf-documents", choices=DOCUMENTS, help="what is a document of a text file (default: line)")
    add("--document-separator", metavar="SEP", help="this line, or with --hf-documents separated this text anywhere, "
        "stands between documents")
    add("--text-field", metavar="NAME", help="field or column of texts in .jsonl and .parquet files (default: text)")
    add("--name-field", metavar="NAME", help="field or column of the documents' names (default: id, if there is one)")
    add("--hf-eos", choices=("document", "none"), default="document", help="what the tokenizer's EOS is put after")


def add_huggingface_args(parser: argparse.ArgumentParser) -> None:
    """What `eval_lm.py` takes."""
    add = parser.add_argument_group("Hugging Face models").add_argument
    add("--hf-dtype", choices=DTYPES, default="auto", help="precision of the model (auto: that of its files)")
    add("--hf-device-map", metavar="MAP", help="spread the model over devices, such as auto (needs accelerate)")
    add("--knn-module", metavar="NAME", help="module whose input is last_ffn_input (default: found by its structure)")


def add_window_args(parser: argparse.ArgumentParser) -> None:
    """Windows, for models of any kind."""
    add = parser.add_argument_group("Windows").add_argument
    add("--max-length", type=positive_int, metavar="N", help="score in windows of N tokens, the first one not scored")
    add("--stride", type=positive_int, metavar="N", help="how far windows move on (default: --max-length)")
    add("--rolling", action="store_true", help="windows as lm-evaluation-harness rolls them, every token scored")
    add("--drop-remainder", action="store_true", help="leave out what is left over after whole windows")
    add("--group-documents", type=positive_int, metavar="N", help="cut N documents at a time (default: all)")
