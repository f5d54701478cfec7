"""Distances from queries to *given* entries of an IVFPQ index, computed from the index's own codes with look-up tables.

Following pointers needs the distance to entries that no search returned. Rebuilding each vector costs D operations and
a call an entry; the codes give the same number with M table look-ups (spec retrieval, section 10.2). With coarse
centroid c and decoded residual r of an entry:

    ||q - c - r||^2 = ||q - c||^2 + (||r||^2 + 2<c, r>) - 2<q, r>

The first term is one matrix product for all lists, the second a constant per entry computed once, the third a sum of M
entries of a (M, 2^nbits) table per query."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.retrieval.faiss_import import require_faiss

CHUNK_LOOKUPS = 1 << 23  # bounds the scratch memory of one pass at about 100 MB


class PQCodes:
    """The codes of an IndexIVFPQ, ordered by id: list number, code and constant term of each entry.

    Needs 8-bit codes. Memory: M + 8 bytes an entry. `distances` runs on any torch device."""

    def __init__(self, ivfpq: Any, size: int, device: torch.device | str = "cpu") -> None:
        faiss = require_faiss()
        pq = ivfpq.pq
        self.m, self.subdim = int(pq.M), int(pq.dsub)
        self.by_residual = bool(ivfpq.by_residual)
        self.inner_product = ivfpq.metric_type == faiss.METRIC_INNER_PRODUCT
        centroids = faiss.vector_to_array(pq.centroids).reshape(self.m, pq.ksub, self.subdim)
        coarse = ivfpq.quantizer.reconstruct_n(0, ivfpq.nlist)
        lists, codes = read_inverted_lists(ivfpq, size)
        self.codes = torch.from_numpy(codes).to(device)
        self.lists = torch.from_numpy(lists).to(device)
        self.codebook = torch.from_numpy(centroids).to(device)
        self.coarse = torch.from_numpy(coarse).to(device)
        self.coarse_norms = self.coarse.square().sum(1)
        self.constants = self._constant_terms()

    def _constant_terms(self) -> Tensor:
        """(N,) float32: ||r||^2 + 2<c, r> for L2 with residuals, ||r||^2 without; not needed for inner products."""
        if self.inner_product:
            return torch.zeros(0)
        table = self.codebook.square().sum(2)  # (M, 256)
        result = torch.zeros(len(self.codes), device=self.codes.device)
        rows = max(1, CHUNK_LOOKUPS // self.m)
        for start in range(0, len(result), rows):
            codes = self.codes[start : start + rows]
            result[start : start + rows] = self._look_up(table[None], codes, None)
        if self.by_residual:
            order = torch.argsort(self.lists, stable=True)
            bounds = torch.searchsorted(self.lists[order].contiguous(), torch.arange(len(self.coarse) + 1).to(order))
            for number, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                if start < end:  # one list at a time: nlist passes, never one per entry
                    entries = order[start:end]
                    inner = torch.einsum("mkd,md->mk", self.codebook, self.coarse[number].view(self.m, -1))
                    result[entries] += 2 * self._look_up(inner[None], self.codes[entries], None)
        return result

    def _look_up(self, tables: Tensor, codes: Tensor, rows: Tensor | None) -> Tensor:
        """Sums tables[row, m, code[m]] over m. tables: (B, M, 256); codes: (n, M) uint8; rows: (n,) or None for row 0."""
        ksub = tables.shape[2]
        offsets = torch.arange(self.m, device=codes.device, dtype=torch.int32) * ksub
        index = codes.int() + offsets
        if rows is not None:
            index += (rows * (self.m * ksub)).int()[:, None]
        return torch.take(tables, index.long()).sum(1)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Distance of query `rows[i]` to entry `ids[i]`: (n,) float32, squared L2 (or the inner product, for METRIC_IP).

        queries: (B, D) float32; rows, ids: (n,) int64."""
        tables = torch.einsum("bmd,mkd->bmk", queries.view(len(queries), self.m, self.subdim), self.codebook)
        coarse = queries @ self.coarse.T if self.by_residual else None
        if not self.inner_product:
            tables *= -2
            norms = queries.square().sum(1)
            base = norms[:, None] if coarse is None else norms[:, None] + self.coarse_norms - 2 * coarse
        elif coarse is not None:
            base = coarse
        else:
            base = queries.new_zeros(len(queries), 1)
        result = queries.new_empty(len(ids))
        step = max(1, CHUNK_LOOKUPS // self.m)
        for start in range(0, len(ids), step):
            some_rows, some_ids = rows[start : start + step], ids[start : start + step]
            lists = self.lists[some_ids].long() if self.by_residual else torch.zeros_like(some_ids)
            part = self._look_up(tables, self.codes[some_ids], some_rows) + base[some_rows, lists]
            if not self.inner_product:
                part += self.constants[some_ids]
            result[start : start + step] = part
        return result


def read_inverted_lists(ivf: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(list number (size,) int32, code (size, code_size) uint8) by entry id, from an IVF index's inverted lists.

    Entries that the index does not hold keep list 0 and code 0. Works for lists in memory and on disk."""
    faiss = require_faiss()
    lists = np.zeros(size, np.int32)
    codes = np.zeros((size, ivf.code_size), np.uint8)
    inverted = ivf.invlists
    for number in range(ivf.nlist):
        count = inverted.list_size(number)
        if not count:
            continue
        ids_pointer, codes_pointer = inverted.get_ids(number), inverted.get_codes(number)
        ids = faiss.rev_swig_ptr(ids_pointer, count)
        inside = (ids >= 0) & (ids < size)
        lists[ids[inside]] = number
        codes[ids[inside]] = faiss.rev_swig_ptr(codes_pointer, count * ivf.code_size).reshape(count, -1)[inside]
        inverted.release_ids(number, ids_pointer)
        inverted.release_codes(number, codes_pointer)
    return lists, codes
