"""An index with a PCA in front (`build_dstore.py --pca`): searched, and followed by pointers, with the flags of any
other index; distances are those of the reduced keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval.index import FaissIndex

LM = (
    "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 --context-window 96 "
    "--batch-size 2 --gen-subset valid --no-progress-bar --dstore-filename checkpoints/dstore16 --knnlm --k 64 "
    "--probe 8 --lmbda 0.25 --knn-sim-func do_not_recomp_l2 --no-load-keys "
    "--members checkpoints/kmeans_s40000000_k400_members.pkl"
)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory, golden: Path, run_cli: Callable[..., Any]) -> Path:
    """An index of the golden keys after a PCA from 32 to 16 dimensions."""
    folder = tmp_path_factory.mktemp("pca")
    for part in ("keys", "vals"):
        shutil.copy(golden / "checkpoints" / f"dstore16_{part}.npy", folder)
    words = (
        f"--dstore_mmap {folder}/dstore16 --dimension 32 --dstore_fp16 --dstore_size 16938 "
        f"--faiss_index {folder}/knn.index --ncentroids 16 --code_size 8 --pca 16 --no-progress-bar"
    )
    done = run_cli("build_dstore", words.split())
    assert done.status == 0, done.stderr
    return folder


def test_search_and_pointers_measure_the_same(reduced: Path, golden: Path) -> None:
    index = FaissIndex(str(reduced / "knn.index"), 16938, probe=16)
    assert (index.dimension, index.core.d, index.code_table() is not None) == (32, 16, True)
    queries = torch.from_numpy(np.load(golden / "expected.npz")["queries_first512"][:20].astype(np.float32))
    distances, ids = index.search(queries, 50)
    rows = torch.arange(20).repeat_interleave(50)
    torch.testing.assert_close(index.distances(queries, rows, ids.flatten()), distances.flatten(), rtol=1e-3, atol=1e-3)

    # by hand: the transform's matrix, and the rebuilt code
    transform = faiss.downcast_VectorTransform(index.faiss_index.chain.at(0))
    matrix = faiss.vector_to_array(transform.A).reshape(16, 32)
    offset = faiss.vector_to_array(transform.b)
    index.core.make_direct_map()
    for row, entry in ((0, 17), (3, 16937)):
        vector = index.core.reconstruct(entry)
        plain = ((matrix @ queries[row].numpy() + offset - vector) ** 2).sum()
        found = index.distances(queries, torch.tensor([row]), torch.tensor([entry])).item()
        assert found == pytest.approx(float(plain), rel=1e-3, abs=1e-3)
    assert index.faiss_index.chain.at(0).d_out == 16


def test_neighbours_resemble_the_exact_ones(reduced: Path, golden: Path) -> None:
    """Most of the exact ten nearest are among the hundred nearest after PCA and quantising."""
    index = FaissIndex(str(reduced / "knn.index"), 16938, probe=16)
    keys = np.fromfile(reduced / "dstore16_keys.npy", "<f2").reshape(-1, 32).astype(np.float32)
    queries = keys[::1700]
    _, found = index.search(torch.from_numpy(queries), 100)
    exact = np.argsort(((keys[None] - queries[:, None]) ** 2).sum(2), axis=1)[:, :10]
    hits = [len(set(near) & set(some)) for near, some in zip(exact.tolist(), found.tolist())]
    assert np.mean(hits) > 7


def test_evaluation_takes_it_as_any_other_index(
    reduced: Path, golden: Path, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    figures = []
    for index in (reduced / "knn.index", golden / "checkpoints" / "knn16.index"):
        results = tmp_path / "r.json"
        words = [*LM.split(), "--indexfile", index, "--results-json", results]
        run = run_cli("eval_lm", words, cwd=golden)
        assert run.status == 0, run.stderr
        figures.append(json.loads(results.read_text()))
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=0.05)
    assert figures[0]["perplexity"] != figures[1]["perplexity"]
    assert abs(figures[0]["searches_saved_percent"] - figures[1]["searches_saved_percent"]) < 15
