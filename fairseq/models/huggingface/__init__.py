"""Causal language models of the transformers library, behind the interface of this package's own models.

transformers is imported when a model or a tokenizer is opened, and only in this package. No code of a model's folder
is run; weights are read from safetensors files, or by torch's loader of tensors alone."""

from __future__ import annotations

from fairseq.models.huggingface.activations import Collector
from fairseq.models.huggingface.folders import is_model_name, resolve
from fairseq.models.huggingface.opening import DTYPES, REPLACEABLE, check_flags, open_language_model, wrapped
from fairseq.models.huggingface.structure import text_config
from fairseq.models.huggingface.text import DOCUMENTS, TokenizedText
from fairseq.models.huggingface.tokenizers import open_tokenizer

__all__ = [
    "DOCUMENTS",
    "DTYPES",
    "REPLACEABLE",
    "Collector",
    "TokenizedText",
    "check_flags",
    "is_model_name",
    "open_language_model",
    "open_tokenizer",
    "resolve",
    "text_config",
    "wrapped",
]
