"""Distances from queries to *given* entries of an IVFPQ index, computed from the index's own codes with look-up tables.

Following pointers needs the distances to entries that no search returned. Reconstructing each vector costs D operations
and a function call per entry; the codes give the same distance with M table look-ups. With coarse centroid c and
decoded residual r of an entry:

    ||q - c - r||^2 = ||q - c||^2 + (||r||^2 + 2<c, r>) - 2<q, r>

The first term is one matrix product for all lists, the second a constant per entry that is computed once, the third a
sum of M entries of a (M, 2^nbits) table per query. The first term is computed in double precision: as a small
difference of large norms, its error in single precision would exchange entries at nearly equal distances, and so change
which pointers remain after the cut to `--max-knns`. With double precision, distances are as accurate as those of a
FAISS search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.entries import bounds_of_rows
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.kernels import pq_kernels

HEADER_BYTES = 8  # list number and constant term, before the code
CHUNK_LOOKUPS = 1 << 23  # bounds the scratch memory of one pass at about 100 MB


class PQCodes:
    """The codes of an IndexIVFPQ, ordered by id: list number, code and constant term of each entry.

    Needs 8-bit codes. Memory: M + 8 bytes per entry (M rounded up to a multiple of 4). `distances` runs on any torch
    device."""

    def __init__(self, ivfpq: Any, size: int, device: torch.device | str = "cpu") -> None:
        faiss = require_faiss()
        pq = ivfpq.pq
        self.m, self.subdim = int(pq.M), int(pq.dsub)
        self.by_residual = bool(ivfpq.by_residual)
        self.inner_product = ivfpq.metric_type == faiss.METRIC_INNER_PRODUCT
        centroids = faiss.vector_to_array(pq.centroids).reshape(self.m, pq.ksub, self.subdim)
        coarse = ivfpq.quantizer.reconstruct_n(0, ivfpq.nlist)
        self.coarse = torch.from_numpy(coarse)
        self.codebook = torch.from_numpy(centroids)
        # inner products, and codes that are not of residuals, have no constant term
        self.has_constants = self.by_residual and not self.inner_product
        self.norms = self.codebook.square().sum(2)  # (M, 256)
        self.lines = self.codebook.transpose(1, 2).contiguous().numpy()  # (M, D / M, 256), for the compiled loops
        # One record per entry (list, constant term, code), so that a pointer's distance reads one place in memory.
        records = read_inverted_lists(ivfpq, size, self._constant_terms if self.has_constants else None)
        self.records = torch.from_numpy(records).to(device)
        words = self.records.view(torch.int32)
        self.lists, self.codes = words[:, 0], self.records[:, HEADER_BYTES : HEADER_BYTES + self.m]
        self.constants = words[:, 1].view(torch.float32) if self.has_constants else None
        self.codebook = self.codebook.to(device)
        self.coarse = self.coarse.to(device, torch.float32 if self.inner_product else torch.float64)
        self.coarse_norms = self.coarse.square().sum(1)
        self._compiled: tuple[Any, ...] | None = None  # arguments of the compiled kernel, made at first use

    def _constant_terms(self, number: int, codes: np.ndarray) -> np.ndarray:
        """||r||^2 + 2<c, r> of entries of list `number` from their codes (n, M): (n,) float32."""
        result = np.empty(len(codes), np.float32)
        if kernels.AVAILABLE:
            of_list = (self.coarse[number].numpy(), self.lines, self.norms.numpy())
            pq_kernels.constant_terms(*of_list, codes, result)
            return result
        inner = torch.einsum("mkd,md->mk", self.codebook, self.coarse[number].view(self.m, -1))
        table = self.norms + 2 * inner
        step = max(1, CHUNK_LOOKUPS // self.m)
        for start in range(0, len(codes), step):
            some = torch.from_numpy(codes[start : start + step].copy())
            result[start : start + step] = self._look_up(table[None], some, None).numpy()
        return result

    def _look_up(self, tables: Tensor, codes: Tensor, rows: Tensor | None) -> Tensor:
        """Sums tables[row, m, code[m]] over m. tables: (B, M, 256); codes: (n, M) uint8; rows: (n,) or None for row
        0."""
        ksub = tables.shape[2]
        offsets = torch.arange(self.m, device=codes.device, dtype=torch.int32) * ksub
        index = codes.int() + offsets
        if rows is not None:
            index += (rows * (self.m * ksub)).int()[:, None]
        return torch.take(tables, index.long()).sum(1)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Distance of query `rows[i]` to entry `ids[i]`: (n,) float32, squared L2 (or the inner product, for
        METRIC_IP).

        queries: (B, D) float32; rows (ascending), ids: (n,) int64."""
        if kernels.AVAILABLE and self.constants is not None and queries.device.type == "cpu":
            return self._compiled_distances(queries, rows, ids)
        tables, base = self._tables(queries)
        result = queries.new_empty(len(ids))
        step = max(1, CHUNK_LOOKUPS // self.m)
        for start in range(0, len(ids), step):
            some_rows, some_ids = rows[start : start + step], ids[start : start + step]
            part = self._look_up(tables, self.codes[some_ids], some_rows)
            if base is not None:
                part += base[some_rows, self.lists[some_ids].long()]
            if self.constants is not None:
                part += self.constants[some_ids]
            result[start : start + step] = part
        return result

    def rebuilt(self, ids: Tensor) -> Tensor:
        """(n, D) float32: the vectors decoded from the codes of entries `ids` (n,), equal to FAISS's reconstruction."""
        codes = self.codes[ids].long()
        vectors = self.codebook[torch.arange(self.m, device=codes.device), codes].flatten(1)
        return vectors.add_(self.coarse[self.lists[ids].long()].float()) if self.by_residual else vectors

    def _compiled_distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        if self._compiled is None:
            records = self.records.numpy().view(np.uint32)
            words = (0,) * (records.shape[1] - pq_kernels.CODE_WORDS)
            self._compiled = (records, self.coarse.float().numpy(), self.lines, words)
        bounds = bounds_of_rows(rows, len(queries))
        result = queries.new_empty(len(ids))
        arrays = (queries.contiguous().numpy(), ids.numpy(), *self._compiled, result.numpy())
        kernels.run_by_rows(pq_kernels.residual_l2_distances, bounds.numpy(), *arrays)
        return result

    def _tables(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part of a distance that depends on a code, (B, M, 256), and the part that depends on its list,
        (B, nlist), None without residuals; both float32."""
        parts = queries.view(len(queries), self.m, self.subdim)
        if not self.inner_product and not self.by_residual:  # ||q - r||^2 is the sum of its parts
            parts, codebook = parts.double(), self.codebook.double()
            norms = parts.square().sum(2, keepdim=True) + codebook.square().sum(2)
            return (norms - 2 * torch.einsum("bmd,mkd->bmk", parts, codebook)).float(), None
        tables = torch.einsum("bmd,mkd->bmk", parts, self.codebook)
        if self.inner_product:
            return tables, queries @ self.coarse.T if self.by_residual else None
        wide = queries.double()
        base = wide.square().sum(1, keepdim=True) + self.coarse_norms - 2 * (wide @ self.coarse.T)
        return tables.mul_(-2), base.float()


def read_inverted_lists(
    ivf: Any, size: int, constant_terms: Callable[[int, np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Records of the entries by id, from an IVF index's inverted lists: (size, 8 + code size rounded up to 4) uint8.

    Bytes 0 to 3 are the list number (int32), bytes 4 to 7 the constant term (float32) that `constant_terms(list number,
    codes)` returns (or zero); the code follows. Entries that are not in the index stay zero: list 0, code 0. Works for
    lists in memory and on disk."""
    faiss = require_faiss()
    records = np.zeros((size, HEADER_BYTES + -(-ivf.code_size // 4) * 4), np.uint8)
    lists, constants = records.view(np.int32)[:, 0], records.view(np.float32)[:, 1]
    codes = records[:, HEADER_BYTES : HEADER_BYTES + ivf.code_size]
    inverted = ivf.invlists

    def read_list(number: int) -> None:
        count = inverted.list_size(number)
        if not count:
            return
        ids_pointer, codes_pointer = inverted.get_ids(number), inverted.get_codes(number)
        ids = faiss.rev_swig_ptr(ids_pointer, count)
        own = faiss.rev_swig_ptr(codes_pointer, count * ivf.code_size).reshape(count, -1)
        terms = np.zeros(count, np.float32) if constant_terms is None else constant_terms(number, own)
        if kernels.AVAILABLE:
            pq_kernels.write_records(number, ids, own, terms, records)
        else:
            inside = (ids >= 0) & (ids < size)
            ids = ids[inside]
            lists[ids], constants[ids], codes[ids] = number, terms[inside], own[inside]
        inverted.release_ids(number, ids_pointer)
        inverted.release_codes(number, codes_pointer)

    def read_lists(first: int, last: int) -> None:
        for number in range(first, last):
            read_list(number)

    kernels.in_threads(read_lists, ivf.nlist)
    return records
