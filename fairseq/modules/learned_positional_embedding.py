"""fairseq's import path of `LearnedPositionalEmbedding`; see `fairseq.modules.positional_embedding`."""

from fairseq.modules.positional_embedding import LearnedPositionalEmbedding

__all__ = ["LearnedPositionalEmbedding"]
