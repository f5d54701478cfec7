"""Tokenisers and sub-word encoders behind `--tokenizer` and `--bpe`, for text that is encoded on the fly.

Each has `encode(str) -> str` and `decode(str) -> str`. The libraries are optional: each is imported when it is used."""

from __future__ import annotations

from fairseq.registry import setup_registry

build_tokenizer, register_tokenizer, TOKENIZER_REGISTRY = setup_registry("--tokenizer")
build_bpe, register_bpe, BPE_REGISTRY = setup_registry("--bpe")

from fairseq.data.encoders import bpe, gpt2_bpe, sentencepiece_bpe, tokenizers  # noqa: E402, F401  (fills the registries)
