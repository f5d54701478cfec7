"""Imports faiss, or says which of its two packages to install (both have the module name faiss, so that only one of
them can be installed)."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from types import ModuleType

from fairseq.errors import MissingDependency, UserError


def require_faiss() -> ModuleType:
    """The faiss module; MissingDependency when neither package is installed."""
    if "faiss" not in sys.modules:
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports each library variant that it tries
    try:
        import faiss
    except ImportError as error:
        if importlib.util.find_spec("faiss") is not None:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            said = f"faiss: it is installed and cannot be loaded ({reason}); is there enough memory?"
            raise UserError(said) from error
        raise MissingDependency(
            "faiss",
            "retrieval",
            "pip install --editable '.[cpu]' (faiss-cpu), or '.[gpu]' (faiss-gpu) on a machine with CUDA",
        ) from error
    module: ModuleType = faiss
    return module


def limit_faiss_threads() -> None:
    """Makes FAISS, if it is installed, use a single thread for calls from the calling thread."""
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)
