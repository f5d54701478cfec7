"""Imports faiss, or says which of its two packages to install (they share one module name and exclude each other)."""

from __future__ import annotations

import contextlib
import logging
from types import ModuleType

from fairseq.errors import MissingDependency


def require_faiss() -> ModuleType:
    """The faiss module; MissingDependency when neither package is installed."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports each library variant that it tries
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency(
            "faiss",
            "retrieval",
            "pip install --editable '.[cpu]' (faiss-cpu), or '.[gpu]' (faiss-gpu) on a machine with CUDA",
        ) from error
    module: ModuleType = faiss
    return module


def limit_faiss_threads() -> None:
    """FAISS, if it is there, uses no other threads for what the calling thread asks of it."""
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)
