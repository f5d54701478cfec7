"""Rows at the end that were never filled do not count as entries: the same rule for the index, exact search, recall,
k-means, greedy merging and the doctor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.evaluation import datastore_checks
from fairseq.retrieval import kernels
from fairseq.retrieval.clusters import load_clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.recall import measure_recall

ROWS, EMPTY, WIDTH = 600, 60, 16


@pytest.fixture(name="prefix")
def prefix_fixture(tmp_path: Path) -> str:
    """Keys near the origin, to which the empty rows would all be near."""
    rng = np.random.default_rng(0)
    keys, values = (0.1 * rng.standard_normal((ROWS, WIDTH))).astype("<f2"), rng.integers(4, 50, ROWS)
    keys[-EMPTY:], values[-EMPTY:] = 0, 0
    keys.tofile(tmp_path / "d_keys.npy")
    values.tofile(tmp_path / "d_vals.npy")
    return str(tmp_path / "d")


def full_index(prefix: str) -> str:
    """An index of all rows, as other tools build it."""
    index = faiss.IndexFlatL2(WIDTH)
    index.add(np.fromfile(prefix + "_keys.npy", "<f2").reshape(ROWS, WIDTH).astype(np.float32))
    faiss.write_index(index, prefix + ".full")
    return prefix + ".full"


@pytest.mark.parametrize("compiled", [True, False])
def test_exact_search(prefix: str, compiled: bool) -> None:
    store = Datastore.open(prefix, ROWS, WIDTH)
    keys = store.require_keys("this")
    index = ExactIndex(keys, compiled=compiled and kernels.AVAILABLE, int8=False, count=store.filled)
    queries = torch.zeros(3, WIDTH)
    distances, ids = index.search(queries, 20)
    wanted = ExactIndex(keys[: store.filled], int8=False).search(queries, 20)
    assert ids.tolist() == wanted[1].tolist() and ids.max() < ROWS - EMPTY
    assert index.distances(queries, torch.arange(3), torch.tensor([0, ROWS - 1, 1])).shape == (3,)
    assert (index.size, index.count) == (ROWS, ROWS - EMPTY)


def test_recall(prefix: str) -> None:
    store = Datastore.open(prefix, ROWS, WIDTH)
    bare = store.without_empty_rows("this")
    index = faiss.IndexFlatL2(WIDTH)
    index.add(bare.read_keys(slice(None)))
    faiss.write_index(index, prefix + ".index")
    recall = measure_recall(FaissIndex(prefix + ".index", ROWS), store, torch.zeros(5, WIDTH), 1000)
    assert (recall.k, recall.at_k) == (ROWS - EMPTY, 1.0)


def test_kmeans_and_greedy_merging(prefix: str, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("kmeans", ["--dstore", prefix, "--dim", WIDTH, "--num-clusters", 8, "--sample", 600, "--save",
                              tmp_path / "c", "--no-progress-bar"])  # fmt: skip
    assert done.status == 0, done.stderr
    assert f"{prefix}: the last {EMPTY} rows are all zero and are left out of the clusters" in done.stderr
    merge = ["--dstore", prefix, "--dim", WIDTH, "--indexfile", full_index(prefix), "--k", 90, "--merge", 80]
    done = run_cli("greedy_merge", [*merge, "--save", tmp_path / "m", "--no-progress-bar"])
    assert done.status == 0, done.stderr
    assert "left out of what is merged" in done.stderr and f"of {ROWS - EMPTY} entries remain" in done.stderr
    for path in (tmp_path / "c_s600_k8_members.pkl", tmp_path / "c_s600_k8_clusters", tmp_path / "m_merge80_clusters"):
        clusters = load_clusters(str(path), ROWS)
        assert sorted(clusters.members.tolist()) == list(range(ROWS - EMPTY))


def test_doctor(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Datastore.open(prefix, ROWS, WIDTH)
    with caplog.at_level(logging.WARNING):
        index = FaissIndex(full_index(prefix), ROWS)
    texts = [finding.text for finding in datastore_checks.check_index(index, store)]
    assert f"the index holds {EMPTY} empty rows besides the {ROWS - EMPTY} entries" in texts
    assert all("all zero" not in finding.text for finding in datastore_checks.check_keys(store))
