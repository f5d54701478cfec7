"""Searching on an accelerator (`--knnlm-gpu`): by faiss-gpu where it is installed, else by scanning the codes with
torch.

The scan is the search of an inverted file, written with tensor operations: find the nearest lists of each query,
compute the distances to all their entries from the codes, and take the k smallest. It runs on any torch device, so it
is tested on the CPU."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fairseq.retrieval.entries import bounds_of, starts_of
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.index.faiss_index import FaissIndex
from fairseq.retrieval.index.pq_codes import PQCodes
from fairseq.retrieval.kernels.nearest_items import UNFOUND

logger = logging.getLogger(__name__)

SCAN_ENTRIES = 1 << 22  # candidates whose distances are in memory at a time: some tens of MB


class CodeScan:
    """Inverted-file search over a PQCodes table, on the table's device.

    order (N,): the entries sorted by list; list l has order[bounds[l]:bounds[l + 1]]."""

    def __init__(self, codes: PQCodes, probe: int) -> None:
        self.codes, self.probe = codes, min(probe, len(codes.coarse))
        lists = codes.lists.long()
        self.order = torch.argsort(lists, stable=True)
        self.bounds = bounds_of(torch.bincount(lists, minlength=len(codes.coarse)))
        self.longest = int((self.bounds[1:] - self.bounds[:-1]).max())

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(distances (B, k) float32, ids (B, k) int64), nearest first; padded with ids of -1."""
        step = max(1, SCAN_ENTRIES // max(1, self.longest * self.probe))
        parts = [self._search_some(some, k) for some in queries.split(step)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _search_some(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        inner = self.codes.inner_product
        coarse = queries.to(self.codes.coarse) @ self.codes.coarse.T
        if not inner:
            coarse = self.codes.coarse_norms - 2 * coarse
        probed = coarse.topk(self.probe, largest=inner).indices  # (B, P) lists
        sizes = self.bounds[probed + 1] - self.bounds[probed]
        counts = sizes.sum(1)
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(counts)
        flat = sizes.flatten()
        source = (self.bounds[probed].flatten() - starts_of(flat)).repeat_interleave(flat)
        ids = self.order[source + torch.arange(len(source), device=queries.device)]
        scores = self.codes.distances(queries, rows, ids) * (1 if inner else -1)

        # One row per query, padded to the largest number of candidates with infinite distances.
        columns = torch.arange(len(ids), device=queries.device) - starts_of(counts)[rows]
        width = max(k, int(counts.max()))
        table = torch.full((len(queries), width), -torch.inf, device=queries.device)
        table[rows, columns] = scores
        best, places = table.topk(k, dim=1)
        positions = starts_of(counts)[:, None] + places
        found = ids[positions.clamp(max=max(len(ids) - 1, 0))] if len(ids) else torch.zeros_like(positions)
        missing = best == -torch.inf
        far = torch.tensor(-UNFOUND if inner else UNFOUND, device=queries.device)
        return torch.where(missing, far, best if inner else -best), torch.where(missing, -1, found)


class DeviceIndex(FaissIndex):
    """A FaissIndex whose searches run on `device`, where its code table is stored too."""

    def __init__(self, path: str, size: int, probe: int | None, device: torch.device | str) -> None:
        super().__init__(path, size, probe, device)
        self._gpu_index = self._clone_to_gpu()
        self._scan: CodeScan | None = None
        table = None if self._gpu_index is not None else self.code_table()
        plain = not self._transforms and self._id_map is None and self.count == self.size
        if table is not None and plain and self.ivf is not None:
            self._scan = CodeScan(table, self.ivf.nprobe)
        how = "faiss-gpu" if self._gpu_index is not None else "a scan of the codes by torch"
        if self._gpu_index is None and self._scan is None:
            how = "the CPU: faiss-gpu is not installed, and torch scans plain IVFPQ indexes only"
        logger.info("--knnlm-gpu: searching with %s (%s)", how, self.device)

    def _clone_to_gpu(self) -> Any:
        faiss = require_faiss()
        if self.device.type != "cuda" or not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            return None
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True  # look-up tables of 64-byte codes do not fit the GPU's shared memory otherwise
        self._resources = faiss.StandardGpuResources()
        return faiss.index_cpu_to_gpu(self._resources, self.device.index or 0, self.faiss_index, options)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`; queries and results stay on the device, unless only the CPU can search this index."""
        if self._scan is not None:
            return self._scan.search(queries, k)
        if self._gpu_index is None:
            return super().search(queries, k)
        distances, ids = self._gpu_index.search(queries.cpu().numpy(), k)
        self._check_found(ids)
        return torch.from_numpy(distances).to(self.device), torch.from_numpy(ids).to(self.device)
