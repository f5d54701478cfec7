"""The exact index against distances computed one by one in double precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fairseq.retrieval import kernels
from fairseq.retrieval.index import exact_index as exact
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.faiss_index import key_distances, pairwise
from fairseq.retrieval.kernels.int8 import search as int8_search
from fairseq.retrieval.kernels.intrinsics import READS_FLOAT16
from fairseq.retrieval.kernels.nearest_items import UNFOUND

WAYS = {
    "compiled": {"compiled": True, "int8": False},
    "int8": {"compiled": True, "int8": True},
    "tensors": {"compiled": False},
    **({"cuda": {"device": "cuda"}} if torch.cuda.is_available() else {}),
}


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Callable[..., ExactIndex]:
    if WAYS[request.param].get("compiled") and not kernels.AVAILABLE:
        pytest.skip("numba is not installed")
    if WAYS[request.param].get("int8") and not READS_FLOAT16:
        pytest.skip("numba compiles for a processor that is not known to read float16")
    return lambda keys: ExactIndex(keys, **WAYS[request.param])


def plain(keys: NDArray[np.floating], queries: torch.Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Slowly: all distances, sorted by distance and then by entry."""
    apart = queries.double().numpy()[:, None] - keys.astype(np.float64)
    distances = np.square(apart).sum(2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def check(index: ExactIndex, keys: NDArray[np.floating], queries: torch.Tensor, k: int) -> None:
    distances, ids = (result.cpu().numpy() for result in index.search(queries, k))
    wanted, order = plain(keys, queries, k)
    assert distances.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_allclose(distances[:, : len(keys)], wanted, rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()
    for mine, true in zip(ids[:, : len(keys)], order, strict=True):
        assert len(set(mine)) == len(true)
    # Entries may be others only where distances are the same but for rounding.
    apart = queries.double().numpy()[:, None] - keys.astype(np.float64)[ids[:, : len(keys)]]
    np.testing.assert_allclose(np.square(apart).sum(2), wanted, rtol=1e-5)


@pytest.mark.parametrize("width, k, dtype", list(itertools.product([1, 7, 130], [1, 10, 500], ["<f2", "<f4"])))
def test_finds_the_nearest(
    make: Callable[..., ExactIndex], monkeypatch: pytest.MonkeyPatch, width: int, k: int, dtype: str
) -> None:
    monkeypatch.setattr(exact, "LARGEST_BLOCK", 300)  # several blocks, the last one shorter
    monkeypatch.setattr(exact, "LEAST_BLOCK", 300)
    monkeypatch.setattr(int8_search, "LARGEST_BLOCK", 300)
    generator = np.random.default_rng(width)
    keys = (generator.standard_normal((1700, width)) * generator.random(width) + 3).astype(dtype)
    queries = torch.from_numpy(keys[::80].astype(np.float32) + generator.normal(0, 0.3, (22, width)).astype(np.float32))
    check(make(keys), keys, queries, k)


def test_near_and_far_together(make: Callable[..., ExactIndex]) -> None:
    """Distances that are tiny beside the norms: rough products alone would put them in any order."""
    generator = np.random.default_rng(0)
    keys = (100 + generator.standard_normal((2000, 24)) * 0.01).astype(np.float32)
    keys[1000:] *= 50
    queries = torch.from_numpy(keys[:5] + np.float32(0.001))
    check(make(keys), keys, queries, 64)


@pytest.mark.parametrize("block", [16, 50, 4096])
def test_ties_go_to_the_first(make: Callable[..., ExactIndex], monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(exact, "LARGEST_BLOCK", block)
    monkeypatch.setattr(exact, "LEAST_BLOCK", block)
    monkeypatch.setattr(int8_search, "LARGEST_BLOCK", block)
    keys = np.random.default_rng(0).integers(0, 2, (3000, 4)).astype(np.float16)  # each of 16 keys many times
    queries = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (9, 4)).astype(np.float32))
    _, ids = make(keys).search(queries, 700)
    np.testing.assert_array_equal(ids.cpu().numpy(), plain(keys, queries, 700)[1])


@pytest.mark.parametrize("entries", [0, 1, 5])
def test_fewer_entries_than_asked_for(make: Callable[..., ExactIndex], entries: int) -> None:
    keys = np.arange(entries * 3, dtype=np.float16).reshape(entries, 3)
    queries = torch.ones(2, 3)
    distances, ids = (result.cpu().numpy() for result in make(keys).search(queries, 8))
    assert distances.shape == ids.shape == (2, 8)
    np.testing.assert_array_equal(ids[:, :entries], plain(keys, queries, 8)[1])
    assert (ids[:, entries:] == -1).all() and (distances[:, entries:] == np.float32(UNFOUND)).all()


def test_no_queries(make: Callable[..., ExactIndex]) -> None:
    distances, ids = make(np.ones((5, 3), np.float16)).search(torch.ones(0, 3), 2)
    assert distances.shape == ids.shape == (0, 2)


def test_keys_that_are_not_finite_are_never_found(make: Callable[..., ExactIndex]) -> None:
    keys = np.arange(30, dtype=np.float16).reshape(10, 3)
    keys[4, 1], keys[7, 0] = np.nan, np.inf
    _, ids = make(keys).search(torch.zeros(1, 3), 10)
    assert ids.cpu().tolist() == [[0, 1, 2, 3, 5, 6, 8, 9, -1, -1]]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f2", ">f4"])
def test_keys_may_lie_in_memory_in_any_order(make: Callable[..., ExactIndex], dtype: str) -> None:
    keys = np.random.default_rng(2).standard_normal((400, 64)).astype(dtype)
    queries = torch.from_numpy(keys[::40].astype(np.float32))
    for lying in (np.asfortranarray(keys), np.repeat(keys, 2, axis=1)[:, ::2], np.repeat(keys, 2, axis=0)[::2]):
        check(make(lying), keys, queries, 5)


@pytest.mark.parametrize("width", [60, 128])
def test_queries_of_another_width_are_refused(make: Callable[..., ExactIndex], width: int) -> None:
    index = make(np.zeros((10, 64), np.float16))
    with pytest.raises(ValueError, match=rf"found queries of shape \(3, {width}\), expected \(B, 64\)"):
        index.search(torch.zeros(3, width), 2)
    with pytest.raises(ValueError, match="expected"):
        index.distances(torch.zeros(1, width), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_work(make: Callable[..., ExactIndex], threads: int) -> None:
    keys = np.random.default_rng(0).integers(0, 3, (2000, 6)).astype(np.float16)  # with ties
    keys[5, 0] = keys[1999, 0] = np.nan
    queries = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).half().float()
    index, before = make(keys), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        _, ids = index.search(queries, 300)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(ids.cpu().numpy(), plain(np.nan_to_num(keys, nan=1000), queries, 300)[1])


def test_more_queries_than_a_pass_takes(make: Callable[..., ExactIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BATCH", 4)
    keys = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float16)
    check(make(keys), keys, torch.randn(11, 6, generator=torch.Generator().manual_seed(0)), 20)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_given_entries(dtype: type) -> None:
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((50, 19)).astype(dtype)
    keys[3] = 6e-8  # below a half's normal range
    queries = torch.randn(4, 19, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 0, 1, 3, 3, 3])
    ids = torch.tensor([3, 49, 0, -1, 7, 7])  # -1 reads the last key
    expected = pairwise(queries.double(), rows, torch.from_numpy(keys[ids.numpy()]).double(), inner_product=False)
    torch.testing.assert_close(key_distances(keys, queries, rows, ids, False).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ExactIndex(keys).distances(queries, rows, ids).double(), expected, rtol=1e-5, atol=0)


def test_infinite_halves_stay_infinite() -> None:
    keys = np.array([[np.inf, 0], [-np.inf, 0], [65504, 0]], np.float16)
    found = key_distances(keys, torch.zeros(1, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3), False)
    assert found.tolist() == [torch.inf, torch.inf, pytest.approx(65504.0**2)]


def test_the_log_says_how_it_searches() -> None:
    said = ExactIndex(np.zeros((4, 3), np.float16), compiled=False).describe()
    assert "4 x 3" in said and "float32" in said and "cpu" in said


needs_int8 = pytest.mark.skipif(not READS_FLOAT16, reason="int8 search needs numba and a processor that reads float16")


@needs_int8
def test_a_sample_that_misleads_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only keys that the sample holds are near, so the k-th entry is farther than they say."""
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((2 * exact.SOME_KEYS, 20)).astype(np.float32)
    keys[: 2 * 120 : 2] /= 10
    queries = torch.from_numpy(generator.standard_normal((3, 20)).astype(np.float32) / 10)
    index, again = ExactIndex(keys, int8=True), []
    searched = index._search_plain
    monkeypatch.setattr(index, "_search_plain", lambda some, k: again.append(len(some)) or searched(some, k))
    check(index, keys, queries, 100)
    assert again == [3]


@needs_int8
def test_queries_that_are_clipped_to_almost_nothing() -> None:
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((12000, 20)).astype(np.float32)
    queries = torch.from_numpy(generator.standard_normal((40, 20)).astype(np.float32))
    queries[:20] += 3000
    check(ExactIndex(keys, int8=True), keys, queries, 9)


@needs_int8
def test_huge_keys_are_no_reason_to_miss_entries() -> None:
    keys = np.full((50, 4), 4e18, np.float32)  # from their centre, farther than sums of squares may be
    keys[::2] *= -1
    check(ExactIndex(keys, int8=True), keys, torch.full((3, 4), 3e18), 30)


@needs_int8
def test_keys_that_the_sample_knows_nothing_of() -> None:
    keys = np.zeros((2 * exact.SOME_KEYS, 4), np.float32)
    keys[1::2] = 3 + np.random.default_rng(0).standard_normal((exact.SOME_KEYS, 4))  # it takes every second
    check(ExactIndex(keys, int8=True), keys, torch.full((3, 4), 3.0), 30)
