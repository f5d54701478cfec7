"""Distances from codes against distances to the vectors that FAISS rebuilds, for every kind of IVFPQ index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval import kernels
from fairseq.retrieval.index import FaissIndex, pq_codes
from fairseq.retrieval.index.pq_codes import PQCodes, read_inverted_lists

ENTRIES, DIMENSION, LISTS = 600, 16, 8


def keys() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ENTRIES, DIMENSION)).astype(np.float32)


def ivfpq(metric: int = faiss.METRIC_L2, by_residual: bool = True, dimension: int = DIMENSION) -> Any:
    coarse = faiss.IndexFlat(dimension, metric)
    index = faiss.IndexIVFPQ(coarse, dimension, LISTS, 4, 8, metric)
    index.by_residual = by_residual
    coarse.this.disown()
    index.own_fields = True
    return index


def filled(index: Any, ids: np.ndarray | None = None) -> Any:
    vectors = keys()
    index.train(vectors)
    if ids is None:
        index.add(vectors)
    else:
        index.add_with_ids(vectors[ids], ids)
    return index


@pytest.fixture(autouse=True, params=["compiled", "arrays"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled kernel, where it can be had, and with array code."""
    if request.param == "arrays":
        monkeypatch.setattr(kernels, "AVAILABLE", False)
    elif not kernels.AVAILABLE:
        pytest.skip("numba is not installed")


def asked(count: int = 2000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, and which query asks for which entry, query by query."""
    rng = np.random.default_rng(1)
    queries = torch.from_numpy(rng.standard_normal((7, DIMENSION)).astype(np.float32) * 2)
    rows, ids = np.sort(rng.integers(0, 6, count)), rng.integers(0, ENTRIES, count)
    return queries, torch.from_numpy(rows), torch.from_numpy(ids)


def expected(index: Any, queries: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, inner: bool) -> np.ndarray:
    ivf = faiss.extract_index_ivf(index)
    ivf.make_direct_map()
    vectors = np.stack([index.reconstruct(int(entry)) for entry in ids])
    asking = queries.numpy()[rows].astype(np.float64)
    return (asking * vectors).sum(1) if inner else ((asking - vectors) ** 2).sum(1)


@pytest.mark.parametrize("by_residual", [True, False])
@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
def test_distances(metric: int, by_residual: bool) -> None:
    index = filled(ivfpq(metric, by_residual))
    queries, rows, ids = asked()
    inner = metric == faiss.METRIC_INNER_PRODUCT
    codes = PQCodes(index, ENTRIES)
    assert codes.by_residual == by_residual
    found = codes.distances(queries, rows, ids)
    np.testing.assert_allclose(found, expected(index, queries, rows, ids, inner), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by_residual", [True, False])
def test_small_differences_of_large_norms(by_residual: bool) -> None:
    """Activations have a large common part. Candidates at nearly equal distances must still stand in the right order,
    because it decides which pointers `--max-knns` keeps: no worse than the distances of a FAISS search."""
    offset = np.full(DIMENSION, 10, np.float32)
    index = ivfpq(by_residual=by_residual)
    vectors = keys() * 0.1 + offset
    index.train(vectors)
    index.add(vectors)
    _, rows, ids = asked()
    queries = torch.from_numpy(vectors[:7] + np.float32(0.01))
    wanted = expected(index, queries, rows, ids, False)
    index.nprobe = LISTS
    distances, found = index.search(queries.numpy(), ENTRIES)
    by_id = np.take_along_axis(distances, np.argsort(found, axis=1), axis=1)
    of_search = np.abs(by_id[rows, ids] - wanted).max()
    of_codes = np.abs(PQCodes(index, ENTRIES).distances(queries, rows, ids).numpy() - wanted).max()
    assert of_codes < max(3 * of_search, 1e-6)
    assert of_codes < 1e-4


def test_distances_are_those_of_a_search() -> None:
    index = filled(ivfpq())
    index.nprobe = LISTS
    queries = asked()[0]
    distances, ids = index.search(queries.numpy(), 50)
    rows = torch.arange(len(queries)).repeat_interleave(50)
    found = PQCodes(index, ENTRIES).distances(queries, rows, torch.from_numpy(ids.ravel()))
    np.testing.assert_allclose(found, distances.ravel(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rotation", [True, False])
def test_pca_in_front(rotation: bool, tmp_path: Path) -> None:
    """An index as built with PCA: queries have the keys' width and are compared after the transform."""
    index = faiss.IndexPreTransform(faiss.PCAMatrix(DIMENSION, 8, 0, rotation), ivfpq(dimension=8))
    filled(index)
    faiss.write_index(index, str(tmp_path / "pca.index"))
    queries, rows, ids = asked()
    ours = FaissIndex(str(tmp_path / "pca.index"), ENTRIES, LISTS)
    assert ours.code_table() is not None
    assert ours.dimension == DIMENSION
    ivf = faiss.extract_index_ivf(index)
    ivf.make_direct_map()
    vectors = np.stack([ivf.reconstruct(int(entry)) for entry in ids])
    transformed = index.chain.at(0).apply(queries.numpy())[rows]
    wanted = ((transformed - vectors) ** 2).sum(1)
    np.testing.assert_allclose(ours.distances(queries, rows, ids), wanted, rtol=1e-4, atol=1e-4)
    distances, found = ours.search(queries, 20)
    again = ours.distances(queries, torch.arange(7).repeat_interleave(20), found.flatten())
    np.testing.assert_allclose(again, distances.flatten(), rtol=1e-4, atol=1e-4)


def test_entries_that_the_index_lacks() -> None:
    """The others keep their distances, and the missing ones have some finite one."""
    held = np.flatnonzero(np.arange(ENTRIES) % 3)
    index = filled(ivfpq(), held)
    queries, rows, ids = asked()
    found = PQCodes(index, ENTRIES).distances(queries, rows, ids)
    assert torch.isfinite(found).all()
    there = np.isin(ids.numpy(), held)
    assert 0 < there.sum() < len(ids)
    lookup = faiss.DirectMap.Hashtable
    index.set_direct_map_type(lookup)
    vectors = np.stack([index.reconstruct(int(entry)) for entry in ids[there]])
    wanted = ((queries.numpy()[rows[there]] - vectors) ** 2).sum(1)
    np.testing.assert_allclose(found[there], wanted, rtol=1e-5, atol=1e-4)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(ivfpq())
    whole = PQCodes(index, ENTRIES)
    distances = whole.distances(*asked())
    monkeypatch.setattr(pq_codes, "CHUNK_LOOKUPS", 64)
    chunked = PQCodes(index, ENTRIES)
    torch.testing.assert_close(whole.constants, chunked.constants, rtol=0, atol=0)
    torch.testing.assert_close(distances, chunked.distances(*asked()), rtol=0, atol=0)


def test_no_entries_asked_for() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert len(PQCodes(filled(ivfpq()), ENTRIES).distances(asked()[0], nothing, nothing)) == 0


def test_inverted_lists() -> None:
    """List numbers and codes by id, for ids that are not the order of insertion."""
    order = np.random.default_rng(2).permutation(ENTRIES)
    index = ivfpq()
    vectors = keys()
    index.train(vectors)
    index.add_with_ids(vectors[order], order)
    records = read_inverted_lists(index, ENTRIES)
    lists, codes = records.view(np.int32)[:, 0], records[:, 8 : 8 + index.code_size]
    nearest = index.quantizer.search(vectors, 1)[1][:, 0]
    np.testing.assert_array_equal(lists, nearest)
    residuals = vectors - index.quantizer.reconstruct_n(0, LISTS)[nearest]
    np.testing.assert_array_equal(codes, index.pq.compute_codes(residuals))


def test_lists_on_disk(tmp_path: Path) -> None:
    index = filled(ivfpq())
    in_memory = read_inverted_lists(index, ENTRIES)
    on_disk = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "lists.ivfdata"))
    on_disk.merge_from_1(index.invlists)
    index.replace_invlists(on_disk)
    faiss.write_index(index, str(tmp_path / "disk.index"))
    ours = FaissIndex(str(tmp_path / "disk.index"), ENTRIES, LISTS)
    np.testing.assert_array_equal(read_inverted_lists(ours.ivf, ENTRIES), in_memory)
    index.replace_invlists(faiss.ArrayInvertedLists(index.nlist, index.code_size))
    del on_disk
