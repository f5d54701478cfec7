"""The scan of a fast index finds the same entries as FAISS; FAISS itself searches indexes that it does not support."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from fairseq.retrieval.index.fast_scan import FastScan
from fairseq.retrieval.kernels import intrinsics

WIDTH = 32
pytestmark = pytest.mark.skipif(not intrinsics.HAS_AVX2, reason="needs numba and AVX2")


def made(parts: int, entries: int = 3000, lists: int = 7, by_residual: bool = False) -> Any:
    vectors = np.random.default_rng(parts).standard_normal((entries, WIDTH)).astype(np.float32)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(WIDTH), WIDTH, lists, parts, 4)
    index.by_residual = by_residual
    index.train(vectors)
    index.add(vectors)
    fast = faiss.IndexIVFPQFastScan(index)
    fast.referenced_objects = [index]  # it owns the centroids
    fast.nprobe, fast.implem = 4, 11
    return fast


def asked(queries: int = 6) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(5).standard_normal((queries, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("parts", [2, 16, 32])
@pytest.mark.parametrize("k", [1, 50, 800, 3001])
def test_as_faiss(parts: int, k: int) -> None:
    index = made(parts)
    ids = FastScan(index).search(asked(), k)
    distances, theirs = index.search(asked(), k)
    for mine, known, far in zip(ids, theirs, distances, strict=True):
        kept = set(mine[mine >= 0].tolist())
        assert len(kept) == (mine >= 0).sum() == (known >= 0).sum()
        assert kept >= set(known[(known >= 0) & (far < far[-1])].tolist())  # of equally far ones either keeps some


def test_no_list_is_near_to_what_is_no_number() -> None:
    queries = asked()
    queries[2] = np.nan
    ids = FastScan(made(8)).search(queries, 9)
    assert (ids[2] == -1).all() and (ids[[0, 1, 3]] >= 0).all()


def test_lists_without_entries() -> None:
    index = made(4, lists=7)
    index.reset()
    index.add(np.zeros((40, WIDTH), np.float32))  # all in one list
    index.nprobe = 7
    ids = FastScan(index).search(asked(), 41)
    assert [sorted(line.tolist()) for line in ids] == [list(range(-1, 40))] * 6


def test_only_what_it_knows() -> None:
    assert FastScan.can(made(8))
    assert not FastScan.can(made(8, by_residual=True))
    assert not FastScan.can(faiss.IndexFlatL2(WIDTH))
