"""Retrieval strategies: their interface, and the built-in strategies, one file each."""

from fairseq.retrieval.retrievers import (  # noqa: F401, I001  (they fill the registry)
    adaptret,
    chains,
    chains_adaptret,
    knnlm,
    random_skip,
    retomaton,
)
from fairseq.retrieval.retrievers.interface import (
    RETRIEVER_REGISTRY,
    Candidates,
    Proposal,
    Resources,
    Retriever,
    Step,
    Weights,
    register_retriever,
)

__all__ = [
    "RETRIEVER_REGISTRY",
    "Candidates",
    "Proposal",
    "Resources",
    "Retriever",
    "Step",
    "Weights",
    "register_retriever",
]
