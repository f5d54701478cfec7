"""Indexes: classes with the methods `search` and `distances` (the protocol `Index`), for FAISS files or for the
keys."""

from fairseq.retrieval.index.faiss_index import FaissIndex
from fairseq.retrieval.index.interface import INDEX_REGISTRY, Index, register_index

__all__ = ["INDEX_REGISTRY", "FaissIndex", "Index", "register_index"]
