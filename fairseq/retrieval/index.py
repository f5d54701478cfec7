"""Indexes: whatever answers `search` (the nearest entries of a query) and `distances` (from a query to given entries).

`FaissIndex` wraps any FAISS file; pointer distances come from IVFPQ codes where the index has them (`pq_codes`), from
FAISS's batched reconstruction elsewhere."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.errors import BadFile, BadFlag, MissingFile
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.pq_codes import PQCodes

logger = logging.getLogger(__name__)

RECONSTRUCT_CHUNK = 1 << 24  # floats rebuilt at a time: 64 MB


class Index(Protocol):
    """What retrieval needs of an index. Distances are squared L2 (smaller is nearer) or inner products (larger is)."""

    size: int
    dimension: int
    inner_product: bool

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(distances (B, k) float32, ids (B, k) int64), nearest first; an id of -1 fills up when fewer were found."""

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """(n,) float32: the distance of `queries[rows[i]]` to entry `ids[i]`. queries (B, D), rows and ids (n,)."""


class FaissIndex:
    """An index file that FAISS wrote. `size` is the number of the datastore's entries, which bounds the ids."""

    def __init__(self, path: str, size: int, probe: int | None = None, device: torch.device | str = "cpu") -> None:
        faiss = require_faiss()
        self.path, self.size, self.device = path, size, torch.device(device)
        self.faiss_index = read_faiss_index(path)
        self.dimension = int(self.faiss_index.d)
        self.inner_product = self.faiss_index.metric_type == faiss.METRIC_INNER_PRODUCT
        ivf = faiss.try_extract_index_ivf(self.faiss_index)  # of the base type, which hides that it is an IVFPQ
        self.ivf = None if ivf is None else faiss.downcast_index(ivf)
        self.count = int(self.faiss_index.ntotal)
        self._codes: PQCodes | None = None
        if probe is not None and self.ivf is not None:
            self.ivf.nprobe = probe
        if self.count > size:
            raise BadFile(path, f"{self.count} entries", f"at most the datastore's {size}", "check which index belongs to it")
        if self.count < size:
            logger.warning("%s holds %d of the datastore's %d entries", path, self.count, size)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`; runs on the CPU, in as many threads as FAISS is given."""
        distances, ids = self.faiss_index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(distances).to(self.device), torch.from_numpy(ids).to(self.device)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Index.distances`."""
        codes = self.code_table()
        if codes is not None:
            return codes.distances(self._transformed(queries), rows, ids)
        return self._reconstructed_distances(queries, rows, ids)

    def code_table(self) -> PQCodes | None:
        """The IVFPQ codes by id, read from the index at first use; None when the index has no such codes."""
        if self._codes is None and self._has_pq_codes():
            self._codes = PQCodes(self.ivf, self.size, self.device)
        return self._codes

    def _has_pq_codes(self) -> bool:
        faiss = require_faiss()
        return isinstance(self.ivf, faiss.IndexIVFPQ) and self.ivf.pq.nbits == 8

    def _transformed(self, queries: Tensor) -> Tensor:
        """Queries after the linear transforms (PCA, OPQ) that stand in front of the inverted file."""
        faiss = require_faiss()
        index = self.faiss_index
        if isinstance(index, faiss.IndexIDMap):
            index = faiss.downcast_index(index.index)
        if not isinstance(index, faiss.IndexPreTransform):
            return queries
        vectors = queries.cpu().numpy()
        for number in range(index.chain.size()):
            vectors = index.chain.at(number).apply(vectors)
        return torch.from_numpy(vectors).to(self.device)

    def _reconstructed_distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        if self.ivf is not None and self.ivf.direct_map.no():
            self.ivf.make_direct_map()
        result = queries.new_empty(len(ids))
        step = max(1, RECONSTRUCT_CHUNK // self.dimension)
        for start in range(0, len(ids), step):
            vectors = self.faiss_index.reconstruct_batch(ids[start : start + step].cpu().numpy())
            entries = torch.from_numpy(vectors).to(self.device)
            result[start : start + step] = pairwise(queries, rows[start : start + step], entries, self.inner_product)
        return result

    def describe(self) -> str:
        """One line for the log: type, entries, lists and probe."""
        lists = f", {self.ivf.nlist} lists, probe {self.ivf.nprobe}" if self.ivf is not None else ""
        return f"{type(self.faiss_index).__name__} of {self.count} x {self.dimension}{lists}"


def pairwise(queries: Tensor, rows: Tensor, vectors: Tensor, inner_product: bool) -> Tensor:
    """(n,) float32: squared L2 distance, or inner product, of `queries[rows[i]]` and `vectors[i]`."""
    asked = queries[rows]
    if inner_product:
        return (asked * vectors).sum(1)
    return (asked - vectors).square_().sum(1)


def read_faiss_index(path: str) -> Any:
    """Reads an index; lists kept on disk are looked for beside it. BadFile when FAISS cannot read it."""
    faiss = require_faiss()
    if not os.path.isfile(path):
        raise MissingFile(path, "check --indexfile, or build it with build_dstore.py")
    try:
        return faiss.read_index(path, faiss.IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise BadFile(path, f"a file that FAISS cannot read ({reason[-160:]})", "a FAISS index", "build it again") from error


def key_distances(keys: np.ndarray, queries: Tensor, rows: Tensor, ids: Tensor, inner_product: bool) -> Tensor:
    """Exact distances from the stored keys (N, D): what `--knn-sim-func` unset (L2) or `dot` asks for.

    An id of -1 reads the last key, as in the original."""
    result = queries.new_empty(len(ids))
    step = max(1, RECONSTRUCT_CHUNK // keys.shape[1])
    host_ids = ids.cpu().numpy()
    for start in range(0, len(ids), step):
        vectors = torch.from_numpy(keys[host_ids[start : start + step]]).to(queries)
        result[start : start + step] = pairwise(queries, rows[start : start + step], vectors, inner_product)
    return result


def check_dimension(index_dimension: int, query_dimension: int, path: str) -> None:
    """BadFlag when the index was built from keys of another width than the model's."""
    if index_dimension != query_dimension:
        raise BadFlag(
            "--indexfile", f"an index of dimension {index_dimension} in {path}", f"the model's {query_dimension}",
            "use the index that was built from this model's datastore",
        )
