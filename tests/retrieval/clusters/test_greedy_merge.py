"""Greedy merging against the loop of the paper, its neighbour lists, and what is made of it: clusters and a smaller
datastore whose evaluation counts the merged entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq import options
from fairseq.errors import BadFile, UserError
from fairseq.knnlm import build_knnlm
from fairseq.retrieval import kernels
from fairseq.retrieval.clusters import greedy_merge, load_clusters
from fairseq.retrieval.clusters.greedy_merge import dump_neighbours, merge
from fairseq.retrieval.datastore import Datastore, read_weights
from fairseq.retrieval.index import FaissIndex
from fairseq.scored_sequences import ScoredSequence


def plain(neighbours: np.ndarray, values: np.ndarray, count: int, seed: int) -> tuple[list[int], list[int]]:
    """One entry after the other, one neighbour after the other."""
    weights, absorber = [1] * len(values), list(range(len(values)))
    for entry in np.random.default_rng(seed).permutation(len(values)).tolist():
        if weights[entry] <= 0:
            continue
        for other in neighbours[entry, : count + 1].tolist():
            if other != entry and other >= 0 and weights[other] == 1 and values[other] == values[entry]:
                weights[other], weights[entry] = 0, weights[entry] + 1
                absorber[other] = entry
    return weights, absorber


@pytest.fixture(params=["arrays", "compiled"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled" and not kernels.AVAILABLE:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(kernels, "AVAILABLE", request.param == "compiled")
    monkeypatch.setattr(greedy_merge, "ROUND_ROWS", 7)
    return request.param


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000), st.booleans())
@settings(max_examples=120)
def test_rounds_against_the_loop(size: int, count: int, words: int, seed: int, hubs: bool) -> None:
    """Random lists: repeated neighbours, missing ones (-1), oneself anywhere or nowhere, hubs that everybody lists."""
    generator = np.random.default_rng(seed)
    low, high = -1, max(1, size // 6) if hubs else size
    neighbours = generator.integers(low, high, (size, count + 2)).astype(np.int32)
    values = generator.integers(0, words, size).astype(np.int32)
    expected = plain(neighbours, values, count, seed)
    for compiled in {False, kernels.AVAILABLE}:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kernels, "AVAILABLE", compiled)
            patched.setattr(greedy_merge, "ROUND_ROWS", 7)
            result = merge(neighbours, values, count, seed)
        assert (result.weights.tolist(), result.absorber.tolist()) == expected


def store(folder: Path, size: int = 400, width: int = 4) -> Datastore:
    """Keys around twenty centres, few values, an exact index."""
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(20, width))[generator.integers(0, 20, size)] + generator.normal(0, 0.1, (size, width))
    keys.astype("<f2").tofile(folder / "store_keys.npy")
    generator.integers(0, 5, (size, 1)).astype("<i8").tofile(folder / "store_vals.npy")
    index = faiss.IndexFlatL2(width)
    index.add(np.fromfile(folder / "store_keys.npy", "<f2").reshape(size, width).astype(np.float32))
    faiss.write_index(index, str(folder / "store.index"))
    return Datastore.open(str(folder / "store"), size, width, True)


def test_merge_invariants(tmp_path: Path, implementation: str) -> None:
    datastore = store(tmp_path)
    index = FaissIndex(str(tmp_path / "store.index"), datastore.size)
    neighbours = dump_neighbours(datastore, index, 10, str(tmp_path / "n.npy"), {}, show_progress=False)
    assert (neighbours[:, 0] == np.arange(400)).all()
    result = merge(neighbours, datastore.values, 5)
    assert result.weights.sum() == 400 and len(result.kept) < 300
    assert (datastore.values[result.absorber] == datastore.values).all()
    assert (result.weights[result.absorber] > 0).all() and result.weights.max() <= 6
    np.testing.assert_array_equal(np.bincount(result.assignment()), result.weights[result.kept])
    np.testing.assert_array_equal(result.kept[result.assignment()], result.absorber)


class CountingIndex(FaissIndex):
    """Stops after a number of searches."""

    asked = 0
    limit = 99

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        if self.asked > self.limit:
            raise KeyboardInterrupt
        return super().search(queries, k)


def test_neighbours_are_searched_resumably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_merge, "SEARCH_BATCH", 50)
    monkeypatch.setattr(greedy_merge, "SAFE_POINT_SECONDS", -1.0)
    datastore, path = store(tmp_path), str(tmp_path / "n.npy")
    killed, again = (CountingIndex(str(tmp_path / "store.index"), datastore.size) for _ in range(2))
    killed.limit = 3
    with pytest.raises(KeyboardInterrupt):
        dump_neighbours(datastore, killed, 4, path, {"a": 1}, show_progress=False)
    found = dump_neighbours(datastore, again, 4, path, {"a": 1}, show_progress=False)
    assert again.asked == 5
    _, expected = again.faiss_index.search(np.asarray(datastore.keys, np.float32), 4)
    np.testing.assert_array_equal(found, expected)
    dump_neighbours(datastore, again, 4, path, {"a": 1}, show_progress=False)
    assert again.asked == 5  # whole already
    dump_neighbours(datastore, again, 4, path, {"a": 2}, show_progress=False)
    assert again.asked == 13  # of something else


def test_the_command_end_to_end(
    tmp_path: Path, golden: Path, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden datastore: clusters for --members, a merged datastore, its own index, and its evaluation."""
    source = golden / "checkpoints"
    words = f"--dstore {source}/dstore16 --dim 32 --indexfile {source}/knn16.index --save {tmp_path}/m --merge 5 --k 12"
    done = run_cli("greedy_merge", [*words.split(), "--no-progress-bar"])
    assert done.status == 0, done.stderr
    clusters = load_clusters(str(tmp_path / "m_merge5_members.pkl"), 16938)
    arrays = load_clusters(str(tmp_path / "m_merge5_clusters"), 16938)
    np.testing.assert_array_equal(clusters.cluster_of, arrays.cluster_of)
    values = np.fromfile(source / "dstore16_vals.npy", "<i8")
    first = clusters.members[clusters.indptr[:-1]]
    assert (values[clusters.members] == np.repeat(values[first], np.diff(clusters.indptr))).all()
    (keys,) = tmp_path.glob("m_merge5_size*_embed32_fp16_keys.npy")
    prefix = str(keys)[: -len("_keys.npy")]
    assert clusters.count == Datastore.open(prefix).size
    build = f"--dstore_mmap {prefix} --faiss_index {tmp_path}/m.index --ncentroids 16 --code_size 8 --no-progress-bar"
    assert run_cli("build_dstore", build.split()).status == 0
    lm = (
        "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 --batch-size 2 "
        "--context-window 96 --gen-subset valid --no-progress-bar --knnlm --k 64 --lmbda 0.25"
    ).split()
    files = ["--dstore-filename", prefix, "--indexfile", f"{tmp_path}/m.index"]
    for flags in (["--no-pointer"], []):
        run = run_cli("eval_lm", [*lm, *files, "--dstore-weights", *flags], cwd=golden)
        assert run.status == 0, run.stderr
        assert ("a pointer leads to the next entry that was kept" in run.stderr) == (not flags)
    assert "--merge: found 12" in run_cli("greedy_merge", [*words.split(), "--merge", "12"]).error


def test_weights_count_merged_entries(tmp_path: Path) -> None:
    """A datastore with each entry several times, and the merged one with weights, give the same probability."""
    keys, values, weights = np.array([[0, 0], [1, 0], [0, 2]]), np.array([7, 9, 7]), np.array([3, 1, 2])
    results = []
    for name, repeat in (("whole", weights), ("merged", np.ones(3, int))):
        np.repeat(keys, repeat, 0).astype("<f4").tofile(tmp_path / f"{name}_keys.npy")
        np.repeat(values, repeat).astype("<i8").tofile(tmp_path / f"{name}_vals.npy")
        index = faiss.IndexFlatL2(2)
        index.add(np.repeat(keys, repeat, 0).astype(np.float32))
        faiss.write_index(index, str(tmp_path / f"{name}.index"))
        files = ["--dstore-filename", str(tmp_path / name), "--indexfile", str(tmp_path / f"{name}.index")]
        words = ["data", "--knnlm", *files, "--k", str(repeat.sum()), "--lmbda", "0.25", "--no-pointer"]
        if name == "merged":
            weights.astype("<i8").tofile(tmp_path / "merged_weights.npy")
            words.append("--dstore-weights")
        knn = build_knnlm(options.parse_args_and_arch(options.get_eval_lm_parser(), words), 2)
        sequence = ScoredSequence(0, torch.zeros(1, 2), torch.tensor([7]), torch.tensor([-1.0]))
        results.append(knn.score([sequence])[0].knn_log_probs.item())
    by_hand = math.log((3 + 2 * math.exp(-4)) / (3 + math.exp(-1) + 2 * math.exp(-4)))
    assert results == pytest.approx([by_hand, by_hand], rel=1e-5)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    datastore = store(tmp_path)
    with pytest.raises(UserError, match="fairseq-greedy-merge"):
        read_weights(datastore)
    np.ones(399, "<i8").tofile(tmp_path / "store_weights.npy")
    with pytest.raises(BadFile, match="3200"):
        read_weights(datastore)
    np.zeros(400, "<i8").tofile(tmp_path / "store_weights.npy")
    with pytest.raises(BadFile, match="at least 1"):
        read_weights(datastore)
