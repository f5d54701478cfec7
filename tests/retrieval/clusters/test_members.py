"""Clusters in their two forms on disk, and files that must be refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from fairseq.errors import BadFile, UserError
from fairseq.retrieval.clusters import Clusters, load_clusters, save_clusters, save_members_pickle

ASSIGNMENT = np.array([3, 0, 3, 1, 0, 3, 5, 1, 3])  # clusters 2 and 4 are empty


def same(first: Clusters, second: Clusters) -> None:
    for name in ("indptr", "members", "cluster_of"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=50))
def test_from_assignment(assignment: list[int]) -> None:
    """Against the definition: each cluster's members, ascending."""
    clusters = Clusters.from_assignment(np.array(assignment))
    assert clusters.count == max(assignment) + 1
    for cluster in range(clusters.count):
        members = clusters.members[clusters.indptr[cluster] : clusters.indptr[cluster + 1]]
        assert members.tolist() == [entry for entry, own in enumerate(assignment) if own == cluster]
    assert clusters.cluster_of.tolist() == assignment


def test_negative_assignment() -> None:
    with pytest.raises(ValueError, match="negative"):
        Clusters.from_assignment(np.array([0, -1]))


def test_pickle_is_what_the_original_reads(tmp_path: Path) -> None:
    """A CSR matrix of int64 ones, indices int32, rows up to the largest cluster, columns up to the largest entry."""
    path = tmp_path / "members.pkl"
    save_members_pickle(str(path), Clusters.from_assignment(ASSIGNMENT))
    with open(path, "rb") as stream:
        matrix = pickle.load(stream)
    assert isinstance(matrix, scipy.sparse.csr_matrix)
    assert matrix.shape == (6, 9)
    assert matrix.dtype == np.int64
    assert matrix.indices.dtype == np.int32
    assert matrix.has_sorted_indices
    np.testing.assert_array_equal(matrix.toarray(), ASSIGNMENT[None] == np.arange(6)[:, None])


def test_both_forms_are_equal(tmp_path: Path) -> None:
    clusters = Clusters.from_assignment(ASSIGNMENT)
    save_members_pickle(str(tmp_path / "members.pkl"), clusters)
    save_clusters(str(tmp_path / "folder"), clusters, {"algorithm": "none"})
    same(load_clusters(str(tmp_path / "members.pkl"), 9), clusters)
    same(load_clusters(str(tmp_path / "folder"), 9), clusters)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_others(tmp_path: Path, form: Any, protocol: int) -> None:
    matrix = form(Clusters.from_assignment(ASSIGNMENT).to_csr())
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix, protocol))
    same(load_clusters(str(tmp_path / "m.pkl"), 9), Clusters.from_assignment(ASSIGNMENT))


def test_golden_file(golden: Path) -> None:
    path = golden / "checkpoints" / "kmeans_s40000000_k400_members.pkl"
    clusters = load_clusters(str(path), 16938)
    with open(path, "rb") as stream:
        matrix = pickle.load(stream)
    assert clusters.count == matrix.shape[0]
    rows, columns = matrix.nonzero()
    np.testing.assert_array_equal(clusters.cluster_of[columns], rows)
    np.testing.assert_array_equal(clusters.members, columns)


def test_entries_that_are_missing_count_as_in_cluster_0(tmp_path: Path) -> None:
    """Without being members of it: quirk Q9."""
    matrix = scipy.sparse.csr_matrix(([1, 1], ([1, 1], [2, 4])), shape=(2, 5))
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix))
    clusters = load_clusters(str(tmp_path / "m.pkl"), 7)
    assert clusters.cluster_of.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert clusters.indptr.tolist() == [0, 0, 2]


def test_members_of_a_larger_datastore(tmp_path: Path) -> None:
    clusters = Clusters.from_assignment(ASSIGNMENT)
    save_members_pickle(str(tmp_path / "m.pkl"), clusters)
    save_clusters(str(tmp_path / "folder"), clusters, {})
    for name in ("m.pkl", "folder"):
        with pytest.raises(BadFile, match=name):
            load_clusters(str(tmp_path / name), 8)


def test_members_of_a_smaller_datastore(tmp_path: Path) -> None:
    """The arrays know their datastore's size; a pickle does not, and is taken as the original takes it."""
    clusters = Clusters.from_assignment(ASSIGNMENT)
    save_clusters(str(tmp_path / "folder"), clusters, {})
    with pytest.raises(BadFile, match="clusters of a datastore of 10 entries"):
        load_clusters(str(tmp_path / "folder"), 10)


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Attack()),
        pickle.dumps(pickle.Unpickler),
        pickle.dumps({0: [1, 2]}),
        pickle.dumps([1, 2, 3]),
        b"not a pickle",
        b"",
    ],
    ids=["runs code", "names a class", "a dict", "a list", "text", "empty"],
)
def test_refused(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(UserError, match="m.pkl: found") as caught:
        load_clusters(str(tmp_path / "m.pkl"), 9)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("indptr", "indices"),
    [
        ([0, 1, 3], [0, 1, 99]),
        ([0, 1, 3], [0, -1, 2]),
        ([0, 5, 3], [0, 1, 2]),
        ([1, 2, 3], [0, 1, 2]),
        ([0, 1, 9], [0, 1, 2]),
    ],
)
def test_inconsistent_matrix(tmp_path: Path, indptr: list[int], indices: list[int]) -> None:
    """A matrix whose arrays were tampered with: no index out of range gets anywhere."""
    matrix = scipy.sparse.csr_matrix(([1, 1, 1], [0, 1, 2], [0, 1, 3]), shape=(2, 9))
    matrix.indptr, matrix.indices = np.array(indptr, np.int32), np.array(indices, np.int32)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(BadFile, match="m.pkl"):
        load_clusters(str(tmp_path / "m.pkl"), 9)


@pytest.mark.parametrize("indices", [[0, 0, 2], [1, 1, 1]])
def test_an_entry_in_several_places(tmp_path: Path, indices: list[int]) -> None:
    """Each entry is in one cluster, once."""
    matrix = scipy.sparse.csr_matrix(([1, 1, 1], [0, 1, 2], [0, 1, 3]), shape=(2, 9))
    matrix.indices = np.array(indices, np.int32)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(BadFile, match="m.pkl: found 3 members that are [12] entries, expected each entry once"):
        load_clusters(str(tmp_path / "m.pkl"), 9)


def test_members_without_a_value(tmp_path: Path) -> None:
    matrix = scipy.sparse.csr_matrix(([1.0, np.nan, 1.0], [0, 1, 2], [0, 1, 3]), shape=(2, 9))
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(BadFile, match="values that are not finite"):
        load_clusters(str(tmp_path / "m.pkl"), 9)


@pytest.mark.parametrize("name", ["indptr.npy", "members.npy", "cluster_of.npy", "clusters.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "other length"])
def test_damaged_folder(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "folder"
    save_clusters(str(folder), Clusters.from_assignment(ASSIGNMENT), {})
    path = folder / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated" or name.endswith("json"):
        path.write_bytes(path.read_bytes()[:-10])
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError):
        load_clusters(str(folder), 9)
    shutil.rmtree(folder)


def test_folder_of_objects(tmp_path: Path) -> None:
    """Arrays of objects would be unpickled by numpy: never."""
    folder = tmp_path / "folder"
    save_clusters(str(folder), Clusters.from_assignment(ASSIGNMENT), {})
    np.save(folder / "members.npy", np.array([Attack()], object), allow_pickle=True)
    with pytest.raises(BadFile, match="members.npy"):
        load_clusters(str(folder), 9)


@pytest.mark.parametrize("name", ["indptr", "members", "cluster_of"])
def test_folder_with_ids_out_of_range(tmp_path: Path, name: str) -> None:
    """The right lengths are not enough: an id beyond its range must not be used as an index."""
    folder = tmp_path / "folder"
    save_clusters(str(folder), Clusters.from_assignment(ASSIGNMENT), {})
    array = np.load(folder / f"{name}.npy")
    array[1] = 1000
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(BadFile, match="folder"):
        load_clusters(str(folder), 9)
