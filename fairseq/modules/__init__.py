"""Layers of the transformer language model, under fairseq's names. This package does not import models, tasks or
data."""

from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax
from fairseq.modules.gelu import gelu, gelu_accurate, get_activation_fn
from fairseq.modules.layer_norm import LayerNorm
from fairseq.modules.multihead_attention import MultiheadAttention
from fairseq.modules.positional_embedding import (
    LearnedPositionalEmbedding,
    PositionalEmbedding,
    SinusoidalPositionalEmbedding,
)
from fairseq.modules.transformer_layer import TransformerDecoderLayer

__all__ = [
    "AdaptiveInput",
    "AdaptiveSoftmax",
    "LayerNorm",
    "LearnedPositionalEmbedding",
    "MultiheadAttention",
    "PositionalEmbedding",
    "SinusoidalPositionalEmbedding",
    "TransformerDecoderLayer",
    "gelu",
    "gelu_accurate",
    "get_activation_fn",
]
