"""The exact index (`--index exact`): every query against every key, straight from the datastore's keys. It needs no
build, and memory for a block of keys in each thread, whatever the datastore's size.

Keys stream from disk in their order, a block at a time, for all queries of a batch. One matrix product estimates half
of all squared distances of a block; an error bound says by how much an estimate may be too large; and only for entries
that may be among the k nearest is the distance itself computed, by subtraction in float32. So estimates may be rough,
while the result is that of computing every distance. They are products of int8 numbers where the processor multiplies
these fast (`kernels.int8`), else products in float32: with two more coordinates a vector,

    |q - x|^2 / 2 = <-q, x> + |x|^2 / 2 + |q|^2 / 2.

Vectors are taken relative to a centre of the keys, which changes no distance and makes the bound small. Of entries
equally far, those that come first in the datastore are nearer."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.entries import starts_of
from fairseq.retrieval.index.faiss_index import RECONSTRUCT_CHUNK, key_distances, pairwise, require_width
from fairseq.retrieval.index.interface import register_index
from fairseq.retrieval.kernels.int8 import Int8Search, use_int8
from fairseq.retrieval.kernels.nearest_items import ENTRY_BITS, UNFOUND, NearestItems

logger = logging.getLogger(__name__)

EXACT = "exact"
BATCH = 1024  # queries that share a pass over the keys
BLOCK_SCORES = 1 << 22  # numbers that a matrix product makes: 16 MB
BLOCK_KEYS = 1 << 19  # numbers of a block of keys: 2 MB, which the processor's cache holds while distances are computed
LEAST_BLOCK, LARGEST_BLOCK = 256, 16384  # keys
SOME_KEYS = 4096  # looked at to choose a centre, and to guess how far the k-th entry is


@register_index(EXACT)
class ExactIndex:
    """The index that is the keys (N, D) themselves, float16 or float32; distances are squared L2.

    compiled: use the compiled loops; int8: estimate distances from int8 numbers, which needs these loops. None: where
    that is faster. count: of the keys, the first that are searched (all): rows after them are empty."""

    inner_product = False
    exact = True
    needs_keys, takes_file = True, False

    @classmethod
    def open(cls, args: argparse.Namespace, datastore: Datastore, device: torch.device | str) -> ExactIndex:
        """The exact index of a datastore's keys; its empty rows at the end are not searched."""
        return cls(datastore.require_keys("--index exact"), device, count=datastore.filled)

    def __init__(
        self,
        keys: NDArray[np.floating],
        device: torch.device | str = "cpu",
        compiled: bool | None = None,
        int8: bool | None = None,
        count: int | None = None,
    ) -> None:
        if not (keys.flags.c_contiguous and keys.dtype.isnative):  # compiled loops read the memory itself
            keys = np.ascontiguousarray(keys, keys.dtype.newbyteorder("="))
        self.keys, self.device = keys, torch.device(device)
        self.size, self.dimension = keys.shape
        self.count = self.size if count is None else count
        possible = kernels.AVAILABLE and self.device.type == "cpu" and self.count <= 1 << ENTRY_BITS
        self.compiled = possible if compiled is None else compiled
        if int8 is None:
            int8 = use_int8(self.dimension) and self.compiled
        entries, some = self._some_keys()
        centre = some.mean(0) if len(some) else np.zeros(self.dimension, np.float32)
        self.centre = torch.from_numpy(centre).to(self.device)  # any vector would do
        self.int8 = Int8Search(self.keys[: self.count], entries, some, centre) if int8 else None
        self.all_finite = True  # as far as is known

    def _some_keys(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(entries (n,), keys (n, D)): from all over the datastore, those that are finite."""
        entries = np.arange(0, self.count, max(1, self.count // SOME_KEYS))
        some = np.asarray(self.keys[entries], np.float32)
        finite = np.isfinite(some).all(1)
        return entries[finite], some[finite]

    def describe(self) -> str:
        """One line for the log: what is searched, where, and how."""
        how = f"float32 products and {'the compiled loop' if self.compiled else 'tensors'}"
        if self.int8 is not None:
            how = f"int8 products, else {how}"
        return f"exact search of {self.count} x {self.dimension} {self.keys.dtype} keys on {self.device}, {how}"

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`."""
        require_width(queries, self.dimension)
        parts = [self._search_some(some.to(self.device, torch.float32), k) for some in queries.split(BATCH)]
        return torch.cat([distances for distances, _ in parts]), torch.cat([ids for _, ids in parts])

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Index.distances`."""
        return key_distances(self.keys, queries, rows, ids, inner_product=False)

    def _search_some(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.int8 is not None and len(queries) and min(k, self.count) > 0:
            found = self._search_int8(self.int8, queries, min(k, self.count))
        else:
            found = self._search_plain(queries, k)
        distances, ids = found
        if distances.shape[1] < k:  # fewer entries than asked for
            missing = (0, k - distances.shape[1])
            distances = torch.nn.functional.pad(distances, missing, value=UNFOUND)
            ids = torch.nn.functional.pad(ids, missing, value=-1)
        return distances, ids

    def _search_int8(self, search: Int8Search, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """By int8 search, and in the other way for the queries that it could not answer."""
        found = search.search(queries, k)
        self._note_finite(found.all_finite)
        rest = found.unanswered
        if len(rest):
            found.distances[rest], found.ids[rest] = self._search_plain(queries[rest], k)
        return found.distances, found.ids

    def _note_finite(self, finite: bool) -> None:
        if not finite and self.all_finite:
            self.all_finite = False
            logger.warning("keys that are infinite, NaN or very large are never found; save the datastore again")

    def _search_plain(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = (NearestItems if self.compiled else _Table)(queries, min(k, self.count))
        extended, norms = self._extended(queries, are_queries=True)
        fitting = BLOCK_KEYS // max(1, self.dimension)
        step = max(LEAST_BLOCK, min(LARGEST_BLOCK, fitting, BLOCK_SCORES // max(1, len(queries))))
        scores = extended.new_empty(0)
        for start in range(0, self.count if len(queries) and k else 0, step):
            keys = torch.from_numpy(np.array(self.keys[start : min(start + step, self.count)])).to(self.device).float()
            extended_keys, key_norms = self._extended(keys, are_queries=False)
            self._note_finite(bool(key_norms.isfinite().all()))
            if scores.shape != (len(queries), len(keys)):
                scores = extended.new_empty(len(queries), len(keys))
            torch.mm(extended, extended_keys.T, out=scores)
            best.offer(scores, self._slack(norms, key_norms), keys, start)
        return best.result()

    def _extended(self, vectors: Tensor, are_queries: bool) -> tuple[Tensor, Tensor]:
        """(matrix (n, W), norms (n,)): centred, with the coordinates that add both squared norms: those of a query meet
        ones of a key, and the other way round."""
        own, other = self.dimension + are_queries, self.dimension + (not are_queries)
        matrix = vectors.new_zeros(len(vectors), -(-(self.dimension + 2) // 32) * 32)
        matrix[:, : self.dimension] = vectors - self.centre
        norms = torch.linalg.vector_norm(matrix, dim=1)
        matrix[:, own], matrix[:, other] = norms.square() / 2, 1
        if are_queries:
            matrix[:, : self.dimension].neg_()
        return matrix, norms

    def _slack(self, norms: Tensor, key_norms: Tensor) -> Tensor:
        """(B,): by how much a score of this block may exceed half the squared distance. Sums of W terms in float32 are
        off by at most W roundings of the sum of their sizes, which the norms (B,) of queries and (n,) of keys bound."""
        rounding = 2.0**-23 if torch.get_float32_matmul_precision() == "highest" else 2.0**-8
        slack = 1.01 * (norms + key_norms.max()).square() * (rounding * (self.dimension + 32)) + 1e-30
        return slack.nan_to_num(nan=torch.inf, posinf=torch.inf)  # keys that are not finite: nothing can be left out


class _Table:
    """What `NearestItems` does, with tensors, for any device."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.best = torch.full((len(queries), k), torch.inf, device=queries.device)
        self.ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)

    def offer(self, scores: Tensor, slack: Tensor, keys: Tensor, start: int) -> None:
        """See `NearestItems.offer`."""
        limit = self.best[:, -1] * 0.5001 + slack  # a little more than half: distances are rounded too
        rows, columns = (~(scores > limit[:, None])).nonzero(as_tuple=True)
        if not len(rows):
            return
        step = max(1, RECONSTRUCT_CHUNK // keys.shape[1])
        found = [
            pairwise(self.queries, some, keys[those], inner_product=False)
            for some, those in zip(rows.split(step), columns.split(step), strict=True)
        ]
        counts = torch.bincount(rows, minlength=len(self.queries))
        places = self.k + torch.arange(len(rows), device=rows.device) - starts_of(counts)[rows]
        distances = torch.nn.functional.pad(self.best, (0, int(counts.max())), value=torch.inf)
        ids = torch.nn.functional.pad(self.ids, (0, int(counts.max())), value=-1)
        distances[rows, places] = torch.cat(found).nan_to_num(nan=torch.inf, posinf=torch.inf)
        ids[rows, places] = columns + start
        order = distances.sort(dim=1, stable=True).indices[:, : self.k]  # what came first stays first
        self.best, self.ids = distances.gather(1, order), ids.gather(1, order)

    def result(self) -> tuple[Tensor, Tensor]:
        """See `NearestItems.result`."""
        missing = self.best == torch.inf
        return self.best.masked_fill(missing, UNFOUND), self.ids.masked_fill(missing, -1)
