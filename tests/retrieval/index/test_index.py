"""Indexes of other kinds than IVFPQ, and indexes that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.errors import BadFile, UserError
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.index.faiss_files import read_faiss_index
from fairseq.retrieval.index.faiss_index import check_dimension, key_distances

ENTRIES, DIMENSION = 300, 8
KEYS = np.random.default_rng(0).standard_normal((ENTRIES, DIMENSION)).astype(np.float32)
QUERIES = torch.from_numpy(np.random.default_rng(1).standard_normal((5, DIMENSION)).astype(np.float32))


def flat_ivf() -> Any:
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(DIMENSION), DIMENSION, 4)
    index.train(KEYS)
    index.add_with_ids(KEYS, np.arange(ENTRIES))
    return index


def flat() -> Any:
    index = faiss.IndexFlatL2(DIMENSION)
    index.add(KEYS)
    return index


def pq_without_ids() -> Any:
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(DIMENSION), DIMENSION, 4, 4, 8)
    index.train(KEYS)
    index.add(KEYS)
    return index


def four_bit_pq() -> Any:
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(DIMENSION), DIMENSION, 4, 4, 4)
    index.train(KEYS)
    index.add(KEYS)
    return index


@pytest.mark.parametrize("make", [flat_ivf, flat, pq_without_ids, four_bit_pq], ids=lambda make: make.__name__)
def test_search_and_distances_agree(make: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "any.index")
    faiss.write_index(make(), path)
    index = FaissIndex(path, ENTRIES, probe=4)
    assert (index.dimension, index.count, index.inner_product) == (DIMENSION, ENTRIES, False)
    distances, ids = index.search(QUERIES, 20)
    assert distances.shape == ids.shape == (5, 20)
    assert distances.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert (distances.diff(dim=1) >= 0).all()
    again = index.distances(QUERIES, torch.arange(5).repeat_interleave(20), ids.flatten())
    torch.testing.assert_close(again, distances.flatten(), rtol=1e-4, atol=1e-4)
    assert (index.code_table() is not None) == (make is pq_without_ids)


@pytest.mark.parametrize("make", [flat_ivf, flat], ids=lambda make: make.__name__)
def test_exact_indexes_are_exact(make: Any, tmp_path: Path) -> None:
    faiss.write_index(make(), str(tmp_path / "exact.index"))
    index = FaissIndex(str(tmp_path / "exact.index"), ENTRIES, probe=4)
    squared = ((QUERIES.numpy()[:, None] - KEYS) ** 2).sum(2)
    np.testing.assert_array_equal(index.search(QUERIES, 10)[1], np.argsort(squared, axis=1)[:, :10])
    rows, ids = torch.tensor([4, 0, 0]), torch.tensor([7, 299, 0])
    np.testing.assert_allclose(index.distances(QUERIES, rows, ids), squared[rows, ids], rtol=1e-5)


def test_inner_product(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(KEYS)
    faiss.write_index(index, str(tmp_path / "ip.index"))
    ours = FaissIndex(str(tmp_path / "ip.index"), ENTRIES)
    assert ours.inner_product
    products = QUERIES.numpy() @ KEYS.T
    np.testing.assert_allclose(ours.search(QUERIES, 3)[0], np.sort(products, axis=1)[:, :-4:-1], rtol=1e-5)
    found = ours.distances(QUERIES, torch.tensor([2]), torch.tensor([11]))
    np.testing.assert_allclose(found, products[2, 11:12], rtol=1e-5)


def test_probe(tmp_path: Path) -> None:
    """Fewer lists visited, fewer entries found; the rest is filled with ids of -1."""
    faiss.write_index(flat_ivf(), str(tmp_path / "ivf.index"))
    few = FaissIndex(str(tmp_path / "ivf.index"), ENTRIES, probe=1).search(QUERIES, ENTRIES)[1]
    all_of_them = FaissIndex(str(tmp_path / "ivf.index"), ENTRIES, probe=4).search(QUERIES, ENTRIES)[1]
    assert (few == -1).any()
    assert (all_of_them >= 0).all()


def test_more_entries_than_the_datastore(tmp_path: Path) -> None:
    faiss.write_index(flat(), str(tmp_path / "flat.index"))
    with pytest.raises(BadFile, match=r"flat.index: found 300 entries, expected at most the datastore's 299"):
        FaissIndex(str(tmp_path / "flat.index"), ENTRIES - 1)


def test_fewer_entries_than_the_datastore(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faiss.write_index(flat(), str(tmp_path / "flat.index"))
    FaissIndex(str(tmp_path / "flat.index"), ENTRIES + 10)
    assert "holds 300 of the datastore's 310 entries" in caplog.text


REMOVED = {"first": [0], "middle": [100, 101, 7], "range": range(40, 90), "last": [299], "last ones": range(280, 300)}


@pytest.mark.parametrize("kind", REMOVED)
@pytest.mark.parametrize("transformed", [False, True])
def test_entries_removed_from_a_flat_index(
    kind: str, transformed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FAISS numbers what remains anew: right only where the last entries were removed."""
    index = faiss.index_factory(DIMENSION, "PCAR8,Flat" if transformed else "Flat")
    index.train(KEYS)
    index.add(KEYS)
    inner = faiss.downcast_index(index.index) if transformed else index
    inner.remove_ids(np.array(REMOVED[kind], np.int64))
    index.ntotal = inner.ntotal
    faiss.write_index(index, str(tmp_path / "flat.index"))
    opened = FaissIndex(str(tmp_path / "flat.index"), ENTRIES)
    assert "an IndexFlat numbers its entries by position, so this is right only" in caplog.text.replace("L2", "")
    if kind.startswith("last"):
        opened.check_positions(KEYS)
    else:
        with pytest.raises(BadFile, match="entries were removed from this index.*build it again from all keys"):
            opened.check_positions(KEYS)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.index: no such file"):
        read_faiss_index(str(tmp_path / "missing.index"))
    (tmp_path / "bad.index").write_bytes(b"not an index at all")
    with pytest.raises(BadFile, match=r"cannot read \(Index type 0x\w+ \(.*\) not recognized\), expected"):
        read_faiss_index(str(tmp_path / "bad.index"))
    faiss.write_index(flat(), str(tmp_path / "whole.index"))
    whole = (tmp_path / "whole.index").read_bytes()
    (tmp_path / "half.index").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match=r"cannot read \(read error in [^ ]+half.index: \d+ != \d+\), expected"):
        read_faiss_index(str(tmp_path / "half.index"))


def test_key_distances() -> None:
    """From half-precision keys; an id of -1 reads the last one, as Python counts."""
    keys = KEYS.astype(np.float16)
    rows, ids = torch.tensor([0, 3, 3]), torch.tensor([5, 0, -1])
    wide = keys.astype(np.float32)[[5, 0, ENTRIES - 1]]
    asking = QUERIES.numpy()[rows]
    np.testing.assert_allclose(key_distances(keys, QUERIES, rows, ids, False), ((asking - wide) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(key_distances(keys, QUERIES, rows, ids, True), (asking * wide).sum(1), rtol=1e-5)


def test_dimension() -> None:
    check_dimension(8, 8, "a.index")
    with pytest.raises(UserError, match=r"dimension 8 in a.index, expected the model's 16"):
        check_dimension(8, 16, "a.index")
