"""Scores of candidates, larger for nearer entries: the choices of `--knn-sim-func`, each with one function for entries
found by a search and one for given entries, such as pointers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fairseq.errors import BadFlag
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import Index
from fairseq.retrieval.index.faiss_index import FaissIndex, key_distances

CHOICES = "do_not_recomp_l2, dot, or leave the flag out for exact L2 distances"


class Similarity(Protocol):
    """Scores of entries that a search found, and of given entries. rebuilds: whether `of_rebuilt` differs from
    `of_entries`."""

    @property
    def rebuilds(self) -> bool: ...

    def of_search(self, queries: Tensor, distances: Tensor, ids: Tensor) -> Tensor:
        """(B, k) float32 from a search's (B, k) distances and ids; queries (B, D)."""

    def of_entries(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """(n,) float32: the score of entry ids[i] for query rows[i]; queries (B, D)."""

    def of_rebuilt(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """As `of_entries`, but equal to the original's score to the last bit: computed from the decoded vector."""


class IndexSimilarity:
    """Scores by the index's own distances, which are those of quantised keys (`do_not_recomp_l2`), or by its inner
    products."""

    def __init__(self, index: Index) -> None:
        if isinstance(index, FaissIndex):
            index.require_own_distances()
        self.index = index
        self.sign = 1.0 if index.inner_product else -1.0

    def of_search(self, queries: Tensor, distances: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return distances * self.sign

    def of_entries(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.index.distances(queries, rows, ids) * self.sign

    @property
    def rebuilds(self) -> bool:
        """See `Similarity`."""
        return isinstance(self.index, FaissIndex) and self.index.rebuilds

    def of_rebuilt(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        assert isinstance(self.index, FaissIndex)
        return self.index.rebuilt_distances(queries, rows, ids) * self.sign


class KeySimilarity:
    """Scores by exact distances, or inner products, computed from the stored keys."""

    rebuilds = False

    def __init__(self, datastore: Datastore, inner_product: bool) -> None:
        self.keys = datastore.require_keys("recomputing distances (or use --knn-sim-func do_not_recomp_l2)")
        self.inner_product = inner_product

    def of_search(self, queries: Tensor, distances: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        return self.of_entries(queries, rows, ids.flatten()).view(ids.shape)

    def of_entries(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        distances = key_distances(self.keys, queries, rows, ids, self.inner_product)
        return distances if self.inner_product else -distances

    def of_rebuilt(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.of_entries(queries, rows, ids)


class WeightedSimilarity:
    """Scores of a merged datastore's entries: the logarithm of an entry's weight, the number of original entries that
    were merged into it, is added (before the temperature)."""

    def __init__(self, similarity: Similarity, weights: Tensor) -> None:
        self.similarity, self.log_weights = similarity, weights.to(torch.float32).log()

    def of_search(self, queries: Tensor, distances: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.similarity.of_search(queries, distances, ids) + self.log_weights[ids]

    def of_entries(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.similarity.of_entries(queries, rows, ids) + self.log_weights[ids]

    @property
    def rebuilds(self) -> bool:
        """See `Similarity`."""
        return self.similarity.rebuilds

    def of_rebuilt(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Similarity`."""
        return self.similarity.of_rebuilt(queries, rows, ids) + self.log_weights[ids]


def needs_keys(function: str | None, metric: str) -> bool:
    """Whether `--knn-sim-func` and `--faiss-metric-type` select scores from the keys, not from the index."""
    return not (function == "do_not_recomp_l2" or (function is None and metric == "ip"))


def build_similarity(function: str | None, metric: str, datastore: Datastore, index: Index) -> Similarity:
    """The similarity that `--knn-sim-func` and `--faiss-metric-type` select; BadFlag for unknown values."""
    if metric not in ("l2", "ip"):
        raise BadFlag("--faiss-metric-type", metric, "l2 or ip")
    if index.inner_product != (metric == "ip"):
        found = "an inner-product index" if index.inner_product else "an L2 index"
        raise BadFlag("--faiss-metric-type", metric, f"the metric of the index, which is {found}")
    if not needs_keys(function, metric) or (index.exact and function in (None, "l2")):
        return IndexSimilarity(index)
    if function in (None, "dot", "l2"):
        return KeySimilarity(datastore, inner_product=function == "dot")
    raise BadFlag("--knn-sim-func", function, CHOICES)
