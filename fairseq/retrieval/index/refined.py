"""An index whose results are refined by the stored keys; `build_dstore.py --preset fast` builds such indexes. A search
takes more than k entries from codes that are fast to scan, computes their distances from the keys, and returns the k
nearest. With some more entries, few of the true neighbours are lost although the codes are coarse."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.index.faiss_index import FaissIndex, key_distances
from fairseq.retrieval.index.fast_scan import FastScan
from fairseq.retrieval.kernels.nearest_items import UNFOUND, nearest_items, packed_items

TOGETHER = 256  # queries searched at a time, which limits the memory for their candidates
QUERY_BY_QUERY = 11  # FAISS's number of the scan that is fastest on one thread with many neighbours


class RefinedIndex(FaissIndex):
    """A FaissIndex refined by `keys` (N, D): a search takes `factor` times k entries from it. Runs on the CPU; results
    are on `device`."""

    exact = True
    rebuilds = False  # distances are those of the keys

    def __init__(
        self,
        path: str,
        size: int,
        probe: int | None,
        device: torch.device | str,
        keys: NDArray[np.floating],
        factor: float,
    ) -> None:
        super().__init__(path, size, probe, "cpu")
        if isinstance(self.core, require_faiss().IndexIVFFastScan):
            self.core.implem = QUERY_BY_QUERY
        scanned = self._id_map is None and FastScan.can(self.core)
        self.scan = FastScan(self.core) if scanned else None
        self.keys, self.factor, self.results = keys, factor, torch.device(device)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`; of entries with equal distances, those with smaller numbers come first."""
        queries = queries.cpu()

        def answer(first: int, last: int) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
            return [self._search_some(some, k) for some in queries[first:last].split(TOGETHER)]

        found = [part for parts in kernels.in_threads(answer, len(queries)) for part in parts]
        distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return torch.from_numpy(distances).to(self.results), torch.from_numpy(ids).to(self.results)

    def _search_some(self, queries: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        ids = self._candidates(queries, max(k, min(math.ceil(self.factor * k), self.count)))
        rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        distances = key_distances(self.keys, queries, rows, ids.clamp(min=0).flatten(), inner_product=False)
        distances = distances.view(ids.shape).masked_fill_(ids < 0, UNFOUND)
        return nearest_items(packed_items(distances.numpy(), ids.numpy()), k)

    def _candidates(self, queries: Tensor, count: int) -> Tensor:
        """(B, count) ids of entries near to queries (B, D), unsorted; padded with -1."""
        if self.scan is None:
            return super().search(queries, count)[1]
        ids = self.scan.search(self._transformed(queries).numpy(), count)
        self._check_found(ids)
        return torch.from_numpy(ids)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Index.distances`: from the keys."""
        return key_distances(self.keys, queries, rows, ids, inner_product=False)

    def describe(self) -> str:
        """One line for the log."""
        return f"{super().describe()}, the best {self.factor:g} k of which the keys choose from"
