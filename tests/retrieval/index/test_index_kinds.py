"""FAISS indexes of every kind: distances to given entries are those of searches, or a sentence says that they are not;
and ids that are not those of the datastore's entries."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from fairseq.errors import BadFile
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.similarity import IndexSimilarity

ROWS, WIDTH = 300, 16
AGREE = (
    "Flat IVF8,Flat IVF8,PQ4x4np PQ4x4np SQ8 SQ4 SQfp16 IVF8,SQ8 HNSW8 HNSW8,SQ8 PCA8,Flat PCAR8,IVF8,PQ4x4np "
    "IVF8,PQ4x4np,RFlat PQ4x4fs,RFlat PCA8,Flat,RFlat IVF8_HNSW8,Flat L2norm,Flat"
).split()
REFUSED = {
    "PQ4x4fs": "distances to given entries differ",
    "IVF8,PQ4x4fs": "an index for fast scanning",
    "LSH": "counts bits that differ",
    "LSHrt": "counts bits that differ",
    "RaBitQ": "distances to given entries differ",
    "IVF8,RaBitQ": "distances to given entries differ",
}


def keys() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def written(index: faiss.Index, folder: Path) -> str:
    faiss.write_index(index, str(folder / "i"))
    return str(folder / "i")


def made(description: str, metric: int, folder: Path) -> str:
    index = faiss.index_factory(WIDTH, description, metric)
    index.train(keys())
    index.add(keys())
    return written(index, folder)


def distances(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(those of a search, those of the same entries when they are given), each (n,)."""
    index = FaissIndex(path, ROWS, 8)
    similarity = IndexSimilarity(index)
    queries = torch.from_numpy(keys()[::30] + np.float32(0.1))
    found, ids = index.search(queries, 7)
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    return found[rows, columns] * similarity.sign, similarity.of_entries(queries, rows, ids[rows, columns])


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("description", AGREE)
def test_given_entries_are_as_far_as_found_ones(description: str, metric: int, tmp_path: Path) -> None:
    found, given = distances(made(description, metric, tmp_path))
    torch.testing.assert_close(given, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("description", REFUSED)
def test_other_distances_are_refused(description: str, tmp_path: Path) -> None:
    path = made(description, faiss.METRIC_L2, tmp_path)
    with pytest.raises(BadFile, match=REFUSED[description]):
        distances(path)
    FaissIndex(path, ROWS).search(torch.from_numpy(keys()[:3]), 4)  # what is found is of use, with distances of keys


@pytest.mark.parametrize("metric", ["L1", "Linf", "Lp", "Canberra", "BrayCurtis", "JensenShannon"])
@pytest.mark.parametrize("description", ["Flat", "HNSW8", "IVF8,Flat"])
def test_other_metrics_are_refused(description: str, metric: str, tmp_path: Path) -> None:
    index = faiss.index_factory(WIDTH, description, getattr(faiss, f"METRIC_{metric}"))
    index.train(np.abs(keys()))
    index.add(np.abs(keys()))
    with pytest.raises(BadFile, match=f"an index of metric METRIC_{metric}, expected METRIC_L2"):
        FaissIndex(written(index, tmp_path), ROWS)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.arange(ROWS) + 1, rf"entries \d+ to {ROWS}"),
        (np.arange(ROWS) - 1, "entries -1 to"),
        (np.arange(ROWS) // 2, f"{ROWS} vectors under {ROWS // 2} ids"),
    ],
)
@pytest.mark.parametrize("description", ["IVF8,Flat", "IVF8,PQ4x4np", "IDMap,Flat", "IDMap2,Flat"])
def test_ids_that_are_no_entries(description: str, ids: np.ndarray, says: str, tmp_path: Path) -> None:
    index = faiss.index_factory(WIDTH, description)
    index.train(keys())
    index.add_with_ids(keys(), ids.astype(np.int64))
    path = written(index, tmp_path)
    with pytest.raises(BadFile, match=says):
        distances(path)


@pytest.mark.parametrize("map_type", [None, faiss.DirectMap.Array, faiss.DirectMap.Hashtable])
@pytest.mark.parametrize("description", ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4np"])
def test_removed_entries_and_saved_maps(description: str, map_type: int | None, tmp_path: Path) -> None:
    """Entries that were removed are far away, whatever direct map the file has."""
    index = faiss.index_factory(WIDTH, description)
    index.train(keys())
    index.add(keys())
    if map_type == faiss.DirectMap.Hashtable:
        index.set_direct_map_type(map_type)
    removed = np.array([5, 17])
    index.remove_ids(removed)
    if map_type == faiss.DirectMap.Array:
        index = faiss.index_factory(WIDTH, description)
        index.train(keys())
        index.add(keys())
        index.set_direct_map_type(map_type)
    path = written(index, tmp_path)
    found, given = distances(path)
    torch.testing.assert_close(given, found, rtol=1e-3, atol=1e-4)
    if map_type != faiss.DirectMap.Array:
        ours = FaissIndex(path, ROWS, 8).distances(
            torch.from_numpy(keys()[:2]), torch.arange(2), torch.from_numpy(removed)
        )
        assert ours.min() > 1e29


@pytest.mark.parametrize("order", ["rows", "columns", "every other", "double", "half"])
def test_queries_in_any_memory_order(order: str, tmp_path: Path) -> None:
    path = made("IVF8,Flat", faiss.METRIC_L2, tmp_path)
    queries = torch.from_numpy(keys()[:8])
    other = {
        "rows": queries,
        "columns": queries.T.contiguous().T,
        "every other": torch.stack([queries, queries], 1).flatten(0, 1)[::2],
        "double": queries.double(),
        "half": queries.half().float().half(),
    }[order]
    index = FaissIndex(path, ROWS, 8)
    wanted = index.search(other.float().contiguous(), 3)[1]
    assert index.search(other, 3)[1].tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="queries of shape"):
        index.search(queries[:, :-1], 3)
