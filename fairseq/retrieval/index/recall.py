"""Recall: the share of the truly nearest entries, known from an exact search of the keys, that an index finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.interface import Index

NOISE = 0.1  # of a coordinate's standard deviation
CHECKED_ROWS = 1 << 16


@dataclass(frozen=True)
class Recall:
    """at_1: share of queries whose nearest entry was found first; at_k: share of the k nearest that were found."""

    queries: int
    k: int
    at_1: float
    at_k: float

    def __str__(self) -> str:
        return f"recall@1 {100 * self.at_1:.1f}%, recall@{self.k} {100 * self.at_k:.1f}% ({self.queries} queries)"

    def figures(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self)


def recall_of(found: Tensor, exact: Tensor) -> Recall:
    """The recall of ids found (B, k) against those of an exact search (B, k), both nearest first and padded with -1."""
    found, exact = found.cpu(), exact.cpu()
    queries, k = exact.shape
    hits = sum(int(torch.isin(true[true >= 0], mine).sum()) for mine, true in zip(found, exact, strict=True))
    valid = exact[:, 0] >= 0
    at_1 = (found[valid, 0] == exact[valid, 0]).double().mean().item() if valid.any() else 1.0
    return Recall(queries, k, at_1, hits / max(1, int((exact >= 0).sum())))


def measure_recall(index: Index, datastore: Datastore, queries: Tensor, k: int) -> Recall:
    """The recall of an L2 index of a datastore's keys for `queries` (B, D) float32, at min(k, N) neighbours.

    All-zero rows at the end are not counted as neighbours. BadFile for keys that are not finite, which an exact search
    never finds."""
    keys = datastore.require_keys("measuring recall")[: datastore.filled]
    for start in range(0, len(keys), CHECKED_ROWS):
        datastore.read_keys(slice(start, min(start + CHECKED_ROWS, len(keys))))
    k = min(k, len(keys))
    return recall_of(index.search(queries, k)[1], exact_neighbours(keys, queries, k))


def noisy_keys(keys: NDArray[np.floating], count: int, seed: int = 1) -> Tensor:
    """(count, D) float32 queries: randomly drawn keys plus noise, since an index finds unchanged keys too easily. Keys
    that are not finite are left out."""
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(len(keys), min(len(keys), count), replace=False, shuffle=False))
    chosen = np.asarray(keys[rows], np.float32)
    chosen = chosen[np.isfinite(chosen).all(axis=1)]
    spread = chosen.std(axis=0, keepdims=True) if len(chosen) else chosen
    return torch.from_numpy(chosen + generator.standard_normal(chosen.shape, np.float32) * spread * np.float32(NOISE))


def exact_neighbours(keys: NDArray[np.floating], queries: Tensor, k: int, inner_product: bool = False) -> Tensor:
    """(B, k) ids of the nearest keys (N, D) of queries (B, D), all keys considered."""
    if not inner_product:
        return ExactIndex(keys).search(queries, k)[1]
    best, ids = torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), -1)
    step = max(1, (1 << 24) // max(1, keys.shape[1]))
    for start in range(0, len(keys), step):
        scores = queries @ torch.from_numpy(np.array(keys[start : start + step], np.float32)).T
        own = torch.arange(start, start + scores.shape[1]).expand(len(queries), -1)
        best, places = torch.cat([best, scores], 1).topk(k, 1)
        ids = torch.cat([ids, own], 1).gather(1, places)
    return ids


class QuerySample:
    """Keeps a random sample of `count` of `total` queries that are passed to `add` in order; it is drawn beforehand."""

    def __init__(self, count: int, total: int, seed: int = 1) -> None:
        generator = np.random.default_rng(seed)
        self._wanted = np.sort(generator.choice(total, min(count, total), replace=False, shuffle=False))
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, queries: Tensor) -> None:
        """queries (T, D): the next ones."""
        first, last = np.searchsorted(self._wanted, [self._seen, self._seen + len(queries)])
        if last > first:
            rows = torch.from_numpy(self._wanted[first:last] - self._seen)
            self._kept.append(queries[rows.to(queries.device)].float().cpu())
        self._seen += len(queries)

    def queries(self) -> Tensor:
        """(n, D) float32, those kept so far."""
        return torch.cat(self._kept)
