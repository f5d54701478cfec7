"""Indexes: what answers `search` and `distances` (the protocol `Index`), from FAISS files or from the keys."""

from fairseq.retrieval.index.faiss_index import FaissIndex, Index

__all__ = ["FaissIndex", "Index"]
