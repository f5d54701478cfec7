"""Downloaded datastores and indexes of every kind, written by hand or by FAISS itself, used through the command
line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.index.faiss_index import FAR

WIDTH = 16


def write(index: Any, path: Path) -> Path:
    faiss.write_index(index, str(path))
    return path


def flat(store: Any, folder: Path) -> Path:
    index = faiss.IndexFlatL2(WIDTH)
    index.add(store.keys)
    return write(index, folder / "flat.index")


def from_factory(description: str, store: Any, ids: np.ndarray | None = None, rows: np.ndarray | None = None) -> Any:
    """An index of FAISS's factory, trained on all keys, holding `rows` of them under `ids`.

    (`np` in a description leaves out a part of PQ training that takes long and serves something else.)"""
    index = faiss.index_factory(WIDTH, description)
    if "OPQ" in description:
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = 2  # of 50, which take a minute
    index.train(store.keys)
    keys = store.keys if rows is None else np.ascontiguousarray(store.keys[rows])
    if ids is None:
        index.add(keys)
    else:
        index.add_with_ids(keys, ids.astype(np.int64))
    return index


@pytest.fixture(name="exact", scope="module")
def exact_fixture(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(prefix, flat index, loss) of the RetoMaton layout: half-precision keys, int64 values, exact distances."""
    folder = tmp_path_factory.mktemp("exact")
    prefix, index = store.write(folder / "dstore16"), flat(store, folder)
    return prefix, index, store.loss(prefix, index)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values


@pytest.mark.parametrize("value_type", ["<i8", "<i4", "<i2"])
@pytest.mark.parametrize("key_type", ["<f2", "<f4"])
@pytest.mark.parametrize("told", ["everything", "nothing", "sidecar"])
def test_types(store: Any, exact: Any, tmp_path: Path, value_type: str, key_type: str, told: str) -> None:
    """int64 is RetoMaton's, int32 knn-transformers', int16 kNN-LM's; no size and no precision need be given."""
    prefix = store.write(tmp_path / "dstore", value_type, key_type)
    flags: list[Any] = []
    if told == "everything":
        flags = ["--dstore-size", store.size, *(["--dstore-fp16"] if key_type == "<f2" else [])]
    elif told == "sidecar":
        description = {"kind": "datastore", "format_version": 1, "rows": store.size, "dimension": WIDTH}
        description |= {"key_dtype": key_type, "value_dtype": value_type}
        Path(f"{prefix}.json").write_text(json.dumps(description))
    assert store.loss(prefix, exact[1], *flags) == pytest.approx(exact[2], abs=1e-6)
    assert store.loss(prefix, exact[1], *flags, "--move-dstore-to-mem") == pytest.approx(exact[2], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("dstore_gpt2_{size}_16", ("<i4", "<f2")),  # knn-transformers
        ("dstore_size{size}_embed16_fp16", ("<i8", "<f2")),  # efficient-knnlm
        ("dstore_size{size}_embed16_fp32", ("<i8", "<f4")),
    ],
)
def test_names_of_other_tools_are_prefixes(store: Any, exact: Any, tmp_path: Path, name: str, types: Any) -> None:
    prefix = store.write(tmp_path / name.format(size=store.size), *types)
    assert store.loss(prefix, exact[1]) == pytest.approx(exact[2], abs=1e-6)


def test_values_alone_are_enough(store: Any, exact: Any, tmp_path: Path) -> None:
    """The keys are the large file: with distances from the index it need not be there."""
    prefix = store.write(tmp_path / "dstore", "<i4")
    Path(f"{prefix}_keys.npy").unlink()
    found = store.loss(prefix, exact[1], "--no-load-keys", "--knn-sim-func", "do_not_recomp_l2")
    assert found == pytest.approx(exact[2], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Zero rows at the end (Law-MT: 19,068,709 rows, of which 19,048,862 are real)

TAIL = 23


@pytest.fixture(name="padded")
def padded_fixture(store: Any, tmp_path: Path) -> Path:
    return store.write(tmp_path / "padded", tail=TAIL)


def build(store: Any, prefix: Path, index: Path, *flags: Any) -> str:
    command = ["--dstore_mmap", prefix, "--faiss_index", index, "--ncentroids", 8, "--code_size", 8]
    command += ["--dimension", WIDTH]
    done = store.world.run("build_dstore", [*command, "--no-progress-bar", *flags])
    assert done.status == 0, done.stderr
    return done.stderr


def test_only_the_filled_rows_are_indexed(store: Any, padded: Path, tmp_path: Path) -> None:
    rows = ["--dstore_size", store.size + TAIL, "--dstore_fp16"]
    told = tmp_path / "told.index"
    build(store, padded, told, *rows, "--actual_dstore_size", store.size)
    found = tmp_path / "found.index"
    log = build(store, padded, found, *rows)
    assert f"the last {TAIL} rows are all zero" in log
    assert told.read_bytes() == found.read_bytes()
    index = faiss.read_index(str(found))
    assert index.ntotal == store.size
    everything = tmp_path / "everything.index"
    build(store, padded, everything, *rows, "--actual-dstore-size", store.size + TAIL)
    assert faiss.read_index(str(everything)).ntotal == store.size + TAIL


def test_an_index_of_the_filled_rows_serves_the_padded_files(store: Any, padded: Path, tmp_path: Path) -> None:
    index = tmp_path / "some.index"
    build(store, padded, index, "--dstore_size", store.size + TAIL, "--dstore_fp16")
    bare = store.write(tmp_path / "bare")
    flags = ["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys", "--dstore-fp16"]
    wanted = store.loss(bare, index, *flags, "--dstore-size", store.size, "--force")  # built from the padded files
    figures, log = store.retrieve(padded, index, *flags, "--dstore-size", store.size + TAIL)
    assert figures["loss_base2"] + figures["searches"] == pytest.approx(wanted, abs=1e-6)
    assert f"holds {store.size} of the datastore's {store.size + TAIL} entries" in log


@pytest.mark.parametrize("description", ["IVF8,PQ8np", "IVF8,Flat", "Flat", "IDMap,Flat"])
def test_entries_that_the_index_lacks_have_no_weight(store: Any, tmp_path: Path, description: str) -> None:
    """k-means assigns the zero rows to clusters too, so that pointers may lead there."""
    ids = np.arange(store.size) if "IDMap" in description else None
    index = write(from_factory(description, store, ids), tmp_path / "some.index")
    ours = FaissIndex(str(index), store.size + TAIL, 8)
    queries = torch.from_numpy(store.keys[:3].copy())
    ids = torch.tensor([5, store.size, store.size + TAIL - 1])
    distances = ours.distances(queries, torch.arange(3), ids)
    assert distances[1:].tolist() == [np.float32(FAR)] * 2
    alone = FaissIndex(str(index), store.size, 8).distances(queries[:1], torch.zeros(1, dtype=torch.int64), ids[:1])
    torch.testing.assert_close(distances[:1], alone)


@pytest.mark.parametrize("description", ["IVF8,PQ8np", "IVF8,Flat"])
def test_pointers_into_the_zero_rows(store: Any, padded: Path, tmp_path: Path, description: str, by_hand: Any) -> None:
    index = write(from_factory(description, store), tmp_path / "some.index")
    assignment = np.arange(store.size + TAIL) % 40
    members = {
        rows: by_hand.members_file(tmp_path / f"{rows}.pkl", assignment[:rows])
        for rows in (store.size, store.size + TAIL)
    }
    flags = ["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys", "--max-knns", 4096]
    losses = [
        store.loss(padded, index, *flags, "--dstore-size", store.size + TAIL, "--members", path)
        for path in members.values()
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Indexes

INDEX_DISTANCES = ("--knn-sim-func", "do_not_recomp_l2", "--no-load-keys")


EXACT = (
    "Flat IDMap,Flat IDMap2,Flat IVF8,Flat IDMap,IVF8,Flat PCAR16,Flat OPQ4_16,IVF8,Flat PCAR16,IVF8,Flat HNSW16,Flat"
).split()
LOSSY = (
    "PCA8,IVF8,PQ4np PCAR8,IVF8,PQ4np OPQ4_8,IVF8,PQ4np PCA8,IVF8,Flat PCA8,Flat PCA8,SQ8 IDMap,PCA8,IVF8,PQ4np "
    "IVF8,PQ4x4 IVF8,PQ8np,RFlat"
).split()


@pytest.mark.parametrize("description", EXACT)
def test_exact_indexes(store: Any, exact: Any, tmp_path: Path, description: str) -> None:
    """Indexes of whole vectors give the same distances as recomputing; rotations change none."""
    order = np.random.default_rng(3).permutation(store.size) if "IDMap" in description else None
    index = write(from_factory(description, store, order, order), tmp_path / "some.index")
    prefix = store.write(tmp_path / "dstore")
    tolerance = 0.02 if "HNSW" in description else 2e-4  # an approximate search may miss a neighbour
    assert store.loss(prefix, index, *INDEX_DISTANCES) == pytest.approx(exact[2], abs=tolerance)


@pytest.mark.parametrize("wrapped", ["IVF8,PQ8np", "IDMap,IVF8,PQ8np", "IDMap2,IVF8,PQ8np", "IVF8,PQ4x4", "IDMap,SQ8"])
def test_explicit_ids(store: Any, tmp_path: Path, wrapped: str) -> None:
    """Entries added in any order, under ids that are their row numbers, are the entries."""
    prefix = store.write(tmp_path / "dstore")
    plain = wrapped.replace("IDMap2,", "").replace("IDMap,", "")
    wanted = store.loss(prefix, write(from_factory(plain, store), tmp_path / "plain.index"), *INDEX_DISTANCES)
    order = np.random.default_rng(4).permutation(store.size)
    index = write(from_factory(wrapped, store, order, order), tmp_path / "ids.index")
    # entries at equal distances, which only quantisation makes, may change places
    assert store.loss(prefix, index, *INDEX_DISTANCES) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("description", LOSSY)
def test_searched_and_given_entries_agree(store: Any, tmp_path: Path, description: str) -> None:
    """An entry's distance is the same whether a search found it or a pointer names it: after the same transforms."""
    ids = np.random.default_rng(5).permutation(store.size) if "IDMap" in description else None
    path = write(from_factory(description, store, ids, ids), tmp_path / "some.index")
    ours = FaissIndex(str(path), store.size, 8)
    assert ours.dimension == WIDTH
    queries = torch.from_numpy(store.keys[::9] + np.float32(0.05))
    distances, found = ours.search(queries, 12)
    rows = torch.arange(len(queries)).repeat_interleave(12)
    again = ours.distances(queries, rows, found.flatten())
    torch.testing.assert_close(again.view_as(distances), distances, rtol=1e-4, atol=1e-4)
    prefix = store.write(tmp_path / "dstore")
    assert np.isfinite(store.loss(prefix, path, *INDEX_DISTANCES))


@pytest.mark.parametrize("description", ["IVF8,PQ8np", "PCA8,IVF8,PQ4np", "IVF8,Flat"])
@pytest.mark.parametrize("read_only", [False, True])
def test_lists_on_disk(store: Any, tmp_path: Path, description: str, read_only: bool) -> None:
    """Both files were moved together since they were written, and may be write-protected."""
    index = from_factory(description, store)
    prefix = store.write(tmp_path / "dstore")
    wanted = store.loss(prefix, write(index, tmp_path / "memory.index"), *INDEX_DISTANCES)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    on_disk = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(first / "lists.ivfdata"))
    on_disk.merge_from_1(ivf.invlists)
    ivf.replace_invlists(on_disk)
    write(index, first / "disk.index")
    ivf.replace_invlists(faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size))
    del on_disk
    shutil.move(first, second)
    if read_only:
        for file in second.iterdir():
            file.chmod(0o444)
    before = {file.name: file.read_bytes() for file in second.iterdir()}
    assert store.loss(prefix, second / "disk.index", *INDEX_DISTANCES) == pytest.approx(wanted, abs=1e-6)
    assert {file.name: file.read_bytes() for file in second.iterdir()} == before


def test_lists_that_are_missing_are_one_sentence(store: Any, tmp_path: Path) -> None:
    index = from_factory("IVF8,PQ8np", store)
    on_disk = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "lists.ivfdata"))
    on_disk.merge_from_1(index.invlists)
    index.replace_invlists(on_disk)
    write(index, tmp_path / "disk.index")
    index.replace_invlists(faiss.ArrayInvertedLists(index.nlist, index.code_size))
    del on_disk
    (tmp_path / "lists.ivfdata").unlink()
    command = [store.world.data, "--path", store.checkpoint, "--cpu", "--gen-subset", "valid", "--knnlm"]
    command += ["--dstore-filename", store.write(tmp_path / "dstore"), "--indexfile", tmp_path / "disk.index"]
    assert "disk.index: found a file that FAISS cannot read" in store.world.run("eval_lm", command).error
