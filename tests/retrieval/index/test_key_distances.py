"""Distances from stored keys to queries: float16, float32, odd widths, keys that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairseq.retrieval import kernels
from fairseq.retrieval.index.faiss_index import key_distances
from fairseq.retrieval.kernels import intrinsics


@pytest.mark.parametrize("width", [1, 2, 7, 64, 130])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("threads", [1, 3])
def test_as_by_hand(width: int, dtype: type, threads: int) -> None:
    generator = np.random.default_rng(width)
    keys = generator.standard_normal((90, width)).astype(dtype)
    keys[3], keys[4], keys[5] = 6e-8, -0.0, 65504  # below the normal range, signed, the largest half
    queries = torch.from_numpy(generator.standard_normal((5, width)).astype(np.float32))
    rows = torch.tensor([0] * 40 + [2] * 90 + [4] * 3)
    ids = torch.from_numpy(np.concatenate([generator.integers(0, 90, 40), np.arange(90), [5, 4, 3]]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = key_distances(keys, queries, rows, ids, inner_product=False)
    finally:
        torch.set_num_threads(before)
    wanted = (queries[rows].double() - torch.from_numpy(keys.astype(np.float64))[ids]).square().sum(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_key_that_is_not_finite_is_never_near(value: float, place: int, dtype: type) -> None:
    keys = np.zeros((4, 6), dtype)
    keys[2, place] = value
    rows, ids = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    found = key_distances(keys, torch.ones(1, 6), rows, ids, inner_product=False)
    assert found[[0, 1, 3]].tolist() == [6.0] * 3
    assert not found[2].isfinite()


@pytest.mark.skipif(not intrinsics.READS_FLOAT16, reason="needs numba, compiling for a processor that reads float16")
def test_processors_that_cannot_read_float16_use_array_code(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float16)
    rows, ids, queries = torch.arange(3).repeat_interleave(40), torch.arange(40).repeat(3), torch.ones(3, 6)
    compiled = key_distances(keys, queries, rows, ids, inner_product=False)
    monkeypatch.setattr(intrinsics, "READS_FLOAT16", False)
    monkeypatch.setattr(kernels, "run_by_rows", None)
    torch.testing.assert_close(key_distances(keys, queries, rows, ids, inner_product=False), compiled)


def test_kernels_within_threads_of_their_pool_do_not_wait_for_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, ids = torch.arange(64).repeat_interleave(8), torch.arange(8).repeat(64)
        keys, queries = np.ones((8, 4), np.float16), torch.zeros(64, 4)
        parts = kernels.in_threads(lambda first, last: key_distances(keys, queries, rows, ids, False), 64)
    finally:
        torch.set_num_threads(before)
    assert len(parts) == 2
    assert all(part.tolist() == [4.0] * 512 for part in parts)
