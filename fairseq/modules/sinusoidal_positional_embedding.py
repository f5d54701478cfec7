"""fairseq's import path of `SinusoidalPositionalEmbedding`; see `fairseq.modules.positional_embedding`."""

from fairseq.modules.positional_embedding import SinusoidalPositionalEmbedding

__all__ = ["SinusoidalPositionalEmbedding"]
