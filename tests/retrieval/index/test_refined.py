"""`build_dstore.py --preset fast`, an evaluation with it, and `--index exact`: commands on the golden data."""

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

from fairseq.errors import BadFile, BadFlag
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.faiss_files import read_faiss_index
from fairseq.retrieval.index.faiss_index import pairwise
from fairseq.retrieval.index.open_index import open_index
from fairseq.retrieval.index.recall import QuerySample, recall_of
from fairseq.retrieval.index.refined import RefinedIndex
from tests.descriptions import edit_description

LM = (
    "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 --context-window 96 "
    "--batch-size 2 --gen-subset valid --no-progress-bar --dstore-filename checkpoints/dstore16 --dstore-fp16 "
    "--dstore-size 16938 --knnlm --k 64 --probe 8 --lmbda 0.25"
)
MEMBERS = "--members checkpoints/kmeans_s40000000_k400_members.pkl"


@pytest.fixture(scope="module", params=["", "--pca 16"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, golden: Path, run_cli: Callable[..., Any]
) -> Path:
    """A fast index of the golden keys, and what the command reported."""
    folder = tmp_path_factory.mktemp("fast")
    for part in ("keys", "vals"):
        shutil.copy(golden / "checkpoints" / f"dstore16_{part}.npy", folder)
    words = (
        f"--dstore_mmap {folder}/dstore16 --dimension 32 --dstore_fp16 --dstore_size 16938 --preset fast "
        f"--faiss_index {folder}/knn.index --ncentroids 16 --code_size 8 --probe 16 --no-progress-bar "
        f"--results-json {folder}/r.json {request.param}"
    )
    done = run_cli("build_dstore", words.split())
    assert done.status == 0, done.stderr
    assert "recall@1024" in done.stderr
    return folder


def opened(folder: Path, load_keys: bool = True) -> tuple[Any, Datastore]:
    datastore = Datastore.open(str(folder / "dstore16"), 16938, 32, True, load_keys=load_keys)
    return open_index(str(folder / "knn.index"), datastore, 16), datastore


def test_answers_with_the_distances_of_the_keys(built: Path) -> None:
    index, datastore = opened(built)
    assert isinstance(index, RefinedIndex) and datastore.keys is not None
    assert (index.core.code_size, index.count) == (8, 16938)  # the bytes an entry that --code_size said
    queries = torch.from_numpy(datastore.keys[5:3000:100].astype(np.float32)) + 0.01
    distances, ids = index.search(queries, 100)
    rows = torch.arange(len(queries)).repeat_interleave(100)
    keys = torch.from_numpy(datastore.keys[ids.flatten().numpy()].astype(np.float32))
    wanted = pairwise(queries, rows, keys, inner_product=False)
    torch.testing.assert_close(distances.flatten(), wanted)
    torch.testing.assert_close(index.distances(queries, rows, ids.flatten()), wanted)
    assert (distances.diff(dim=1) >= 0).all()

    index.scan = None  # as where the processor lacks an instruction
    theirs = index.search(queries, 100)
    assert (theirs[1] == ids).double().mean() > 0.99  # of equally near codes others may be chosen

    exact = ExactIndex(datastore.keys).search(queries, 100)[1]
    _, unrefined = FaissIndex.search(index, queries, 100)
    assert recall_of(ids, exact).at_k > recall_of(unrefined, exact).at_k + 0.02
    assert recall_of(ids, exact).at_1 > 0.9


def test_reports_recall_at_the_stored_probe(built: Path) -> None:
    (figures,) = json.loads((built / "r.json").read_text())["recall"]  # of 16 lists no more are visited
    assert (figures["probe"], figures["queries"], figures["k"]) == (16, 64, 1024)
    assert 0.5 < figures["at_k"] <= 1


def test_without_keys_it_is_refused(built: Path) -> None:
    with pytest.raises(BadFlag, match="--no-load-keys"):
        opened(built, load_keys=False)


def test_rebuilding_entries_of_a_fast_scan_is_refused(built: Path) -> None:
    index = FaissIndex(str(built / "knn.index"), 16938, 16)  # FAISS would end the process
    with pytest.raises(BadFile, match="fast scanning"):
        index.distances(torch.zeros(1, 32), torch.tensor([0]), torch.tensor([3]))


def test_asks_for_more_than_there_are(built: Path) -> None:
    index, _ = opened(built)
    _, ids = index.search(torch.zeros(1, 32), 16940)
    assert sorted(ids[0, :16938].tolist()) == list(range(16938)) and ids[0, 16938:].tolist() == [-1, -1]


def test_entries_of_another_datastore(built: Path) -> None:
    index, _ = opened(built)
    index.size = 2000
    with pytest.raises(BadFile, match="below the datastore's 2000"):
        index.search(torch.zeros(1, 32), 100)


def test_a_sidecar_that_asks_for_nonsense(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "copy")
    sidecar = tmp_path / "copy" / "knn.index.json"
    edit_description(sidecar, refine=-1)
    with pytest.raises(BadFile, match="refine -1"):
        opened(tmp_path / "copy")


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(16), 16, 4, 8, 4)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "good"))
    assert read_faiss_index(str(tmp_path / "good")).ntotal == 600
    index.M2 = 64
    faiss.write_index(index, str(tmp_path / "bad"))
    with pytest.raises(BadFile, match="blocks"):
        read_faiss_index(str(tmp_path / "bad"))


def test_a_sample_of_the_queries_that_pass() -> None:
    queries = torch.arange(50.0)[:, None]
    sample = QuerySample(10, 50, seed=3)
    for some in queries.split([1, 20, 0, 29]):
        sample.add(some)
    kept = sample.queries().flatten().tolist()
    assert len(set(kept)) == 10 and kept == sorted(kept)


@pytest.mark.parametrize("method", ["--no-pointer", f"{MEMBERS} --min-knns 1", f"{MEMBERS} --min-knns 9999999"])
def test_evaluation_without_an_index(
    golden: Path, tmp_path: Path, run_cli: Callable[..., Any], method: str
) -> None:
    """--index exact gives what a flat index file and distances from the keys give, and finds all there is."""
    keys = np.fromfile(golden / "checkpoints" / "dstore16_keys.npy", "<f2").reshape(-1, 32)[:16938]
    flat = faiss.IndexFlatL2(32)
    flat.add(keys.astype(np.float32))
    faiss.write_index(flat, str(tmp_path / "flat.index"))
    results = []
    for index in ("--index exact", f"--indexfile {tmp_path}/flat.index"):
        words = f"{LM} {index} {method} --index-recall 40 --results-json {tmp_path}/r.json"
        done = run_cli("eval_lm", words.split(), cwd=golden)
        assert done.status == 0, done.stderr
        results.append(json.loads((tmp_path / "r.json").read_text()))
    mine, theirs = results
    assert mine["loss_base2"] == pytest.approx(theirs["loss_base2"], abs=1e-5)
    assert mine["searches"] == theirs["searches"]
    assert mine["index_recall"]["at_k"] == 1 and mine["index_recall"]["queries"] == 40
    assert theirs["index_recall"]["at_k"] > 0.99


def test_searches_of_the_exact_index_are_kept(golden: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    words = f"{LM} --index exact --no-pointer --save-scores {tmp_path}/s --save-searches"
    done = run_cli("eval_lm", words.split(), cwd=golden)
    assert done.status == 0, done.stderr
    sweep = (
        f"--scores {tmp_path}/s --output {tmp_path}/out --dstore-filename checkpoints/dstore16 --dstore-size 16938 "
        "--dstore-fp16 --index exact --strategy knnlm --k 16 64 --no-progress-bar"
    )
    done = run_cli("sweep", sweep.split(), cwd=golden)
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "s").glob("searches-*"))) == 1  # asked once


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--index exact --indexfile checkpoints/knn16.index", "--index: found"),
        ("--index exact --no-load-keys", "--no-load-keys"),
        ("--index exact --faiss-metric-type ip", "--faiss-metric-type"),
        ("--indexfile checkpoints/knn16.index --no-load-keys --index-recall 4", "--index-recall"),
    ],
)
def test_flags_that_do_not_go_together(golden: Path, run_cli: Callable[..., Any], flags: str, said: str) -> None:
    done = run_cli("eval_lm", f"{LM} {flags}".split(), cwd=golden)
    assert done.status == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, remedy",
    [
        ("--indexfile BUILT/knn.index", "BUILT/knn.index was built with --preset fast and needs them: copy them here"),
        ("--index exact", "--index exact compares with them: copy them here"),
        ("--indexfile checkpoints/knn16.index", "or do without the keys: --knn-sim-func do_not_recomp_l2"),
        ("--indexfile checkpoints/knn16.index --knn-sim-func do_not_recomp_l2 --index-recall 4", "drop --index-recall"),
        ("--indexfile checkpoints/knn16.index --knn-sim-func do_not_recomp_l2", None),
    ],
)
def test_missing_keys_and_what_does_without_them(
    built: Path, golden: Path, tmp_path: Path, run_cli: Callable[..., Any], flags: str, remedy: str | None
) -> None:
    shutil.copyfile(golden / "checkpoints" / "dstore16_vals.npy", tmp_path / "d_vals.npy")
    words = f"{LM} {flags} --dstore-filename {tmp_path}/d".replace("BUILT", str(built)).split()
    done = run_cli("eval_lm", words, cwd=golden)
    if remedy is None:
        assert done.status == 0, done.stderr
    else:
        assert f"{tmp_path}/d_keys.npy: no such file; " in done.error
        assert remedy.replace("BUILT", str(built)) in done.error and "--no-load-keys" not in done.error
