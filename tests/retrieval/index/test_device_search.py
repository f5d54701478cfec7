"""The torch scan of IVFPQ codes against FAISS's own search, on CPU tensors (the same code runs on a GPU)."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval.index import device_search
from fairseq.retrieval.index.device_search import CodeScan, DeviceIndex
from fairseq.retrieval.index.pq_codes import PQCodes

ENTRIES, WIDTH, LISTS = 2000, 16, 32


def built(metric: int = faiss.METRIC_L2, by_residual: bool = True) -> faiss.IndexIVFPQ:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(ENTRIES, WIDTH)).astype(np.float32)
    quantizer = faiss.IndexFlatL2(WIDTH) if metric == faiss.METRIC_L2 else faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFPQ(quantizer, WIDTH, LISTS, 4, 8, metric)
    index.by_residual = by_residual
    index.train(keys)
    index.add_with_ids(keys, np.arange(ENTRIES))
    return index


@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("probe", [1, 4, 32])
def test_the_scan_finds_what_faiss_finds(
    metric: int, by_residual: bool, probe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_search, "SCAN_ENTRIES", 1 << 11)  # several passes
    index = built(metric, by_residual)
    index.nprobe = probe
    queries = np.random.default_rng(1).normal(size=(50, WIDTH)).astype(np.float32)
    k = 100
    expected, expected_ids = index.search(queries, k)
    distances, ids = CodeScan(PQCodes(index, ENTRIES), probe).search(torch.from_numpy(queries), k)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ids.numpy() == -1, expected_ids == -1)
    for mine, theirs in zip(ids.numpy(), expected_ids):  # equal distances may change places
        assert len(np.intersect1d(mine, theirs)) >= len(np.unique(theirs)) - 2


def test_more_neighbours_than_entries_probed() -> None:
    index = built()
    index.nprobe = 1
    distances, ids = CodeScan(PQCodes(index, ENTRIES), 1).search(torch.zeros(2, WIDTH), 1500)
    assert (ids[:, -1] == -1).all() and (distances[:, -1] > 1e38).all() and (ids[:, 0] >= 0).all()


def test_a_device_index_answers_like_the_index_on_the_cpu(tmp_path: object) -> None:
    path = f"{tmp_path}/ivfpq.index"
    faiss.write_index(built(), path)
    ours = DeviceIndex(path, ENTRIES, 4, "cpu")
    queries = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))
    ours.ivf.nprobe = 4
    expected, _ = ours.faiss_index.search(queries.numpy(), 10)
    distances, ids = ours.search(queries, 10)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4, atol=1e-4)
    again = ours.distances(queries, torch.arange(20).repeat_interleave(10), ids.flatten())
    np.testing.assert_allclose(again.view(20, 10).numpy(), distances.numpy(), rtol=1e-4, atol=1e-4)
