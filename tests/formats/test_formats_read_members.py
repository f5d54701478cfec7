"""Members files: the pickled CSR matrix of RetoMaton in the variants that NumPy and SciPy of other years leave behind,
each giving the loss of the plain one; and what is no CSR matrix, refused in one sentence."""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse

CLUSTERS = 40


@pytest.fixture(name="clustered", scope="module")
def clustered_fixture(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(evaluate with a members file, the assignment of entries to clusters, loss of the plain file)."""
    folder = tmp_path_factory.mktemp("members")
    prefix = store.write(folder / "dstore")
    index = faiss.IndexFlatL2(16)
    index.add(store.keys)
    faiss.write_index(index, str(folder / "flat.index"))
    rng = np.random.default_rng(6)
    centroids = store.keys[rng.choice(store.size, CLUSTERS, replace=False)]
    assignment = ((store.keys[:, None] - centroids) ** 2).sum(2).argmin(1)

    def loss(path: Path, *flags: Any) -> float:
        return store.loss(prefix, folder / "flat.index", "--members", path, "--max-knns", 512, *flags)

    def plain(path: Path, content: Any, protocol: int = 4) -> Path:
        path.write_bytes(pickle.dumps(content, protocol))
        return path

    wanted = loss(plain(folder / "plain.pkl", matrix_of(assignment)))
    without = store.loss(prefix, folder / "flat.index", "--max-knns", 512)
    assert abs(wanted - without) > 0.01  # clusters matter here
    return loss, assignment, wanted, plain


def matrix_of(assignment: np.ndarray, data: str = "<i8", index: str = "<i4", shape: Any = None) -> Any:
    """clusters x entries, its arrays made here: ones, and the entries of each cluster in ascending order."""
    indices = np.argsort(assignment, kind="stable").astype(index)
    counts = np.bincount(assignment)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(index)
    matrix = scipy.sparse.csr_matrix((len(counts), len(assignment)) if shape is None else shape, dtype=data)
    matrix.indices, matrix.indptr, matrix.data = indices, indptr, np.ones(len(indices), data)
    return matrix


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(clustered: Any, tmp_path: Path, protocol: int) -> None:
    loss, assignment, wanted, plain = clustered
    assert loss(plain(tmp_path / "m.pkl", matrix_of(assignment), protocol)) == wanted


@pytest.mark.parametrize("index", ["<i4", "<i8"])
@pytest.mark.parametrize("data", ["<i8", "<i4", "|i1", "|b1", "<f4", "<f8"])
def test_types(clustered: Any, tmp_path: Path, index: str, data: str) -> None:
    loss, assignment, wanted, plain = clustered
    path = plain(tmp_path / "m.pkl", matrix_of(assignment, data, index))
    stored = pickle.loads(path.read_bytes())
    assert stored.indices.dtype == index
    assert loss(path) == wanted


@pytest.mark.parametrize("scipy_module", ["scipy.sparse.csr", "scipy.sparse._csr", "scipy.sparse"])
@pytest.mark.parametrize("numpy_module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_module_names_of_other_versions(clustered: Any, tmp_path: Path, scipy_module: str, numpy_module: str) -> None:
    """Before SciPy 1.8 the class lived in scipy.sparse.csr; before NumPy 2 arrays were made in numpy.core."""
    loss, assignment, wanted, plain = clustered
    path = plain(tmp_path / "m.pkl", matrix_of(assignment), 2)
    raw = path.read_bytes()
    for line, name in ((b"cscipy.sparse._csr\n", scipy_module), (b"cnumpy._core.multiarray\n", numpy_module)):
        assert line in raw
        raw = raw.replace(line, f"c{name}\n".encode())
    path.write_bytes(raw)
    assert loss(path) == wanted


def test_state_of_older_classes(clustered: Any, tmp_path: Path) -> None:
    """SciPy's matrices once had no private flags in their state, and others later."""
    loss, assignment, wanted, plain = clustered
    matrix = matrix_of(assignment)
    matrix.__dict__.update(maxprint=50, _has_sorted_indices=True)
    matrix.__dict__.pop("_has_canonical_format", None)
    assert loss(plain(tmp_path / "m.pkl", matrix, 2)) == wanted


def test_unsorted_members(clustered: Any, tmp_path: Path) -> None:
    """The order inside a row matters only where --max-knns cuts."""
    loss, assignment, wanted, plain = clustered
    matrix = matrix_of(assignment)
    for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:]):
        matrix.indices[start:end] = matrix.indices[start:end][::-1].copy()
    matrix.has_sorted_indices = False
    found = loss(plain(tmp_path / "m.pkl", matrix))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_stored_zeros_are_no_members(clustered: Any, tmp_path: Path) -> None:
    loss, assignment, wanted, plain = clustered
    matrix = matrix_of(assignment)
    extra = scipy.sparse.csr_matrix((np.zeros(50), (np.arange(50) % CLUSTERS, np.arange(50))), shape=matrix.shape)
    both = [np.concatenate([np.stack([m.tocoo().row, m.tocoo().col]), [m.tocoo().data]]) for m in (matrix, extra)]
    rows, columns, data = np.concatenate(both, axis=1)
    order = np.lexsort((data == 0, columns, rows))  # zeros after the ones of the same entry
    padded = scipy.sparse.csr_matrix(matrix.shape, dtype=np.int64)
    padded.indices, padded.data = columns[order].astype(np.int32), data[order].astype(np.int64)
    padded.indptr = np.concatenate([[0], np.cumsum(np.bincount(rows.astype(int), minlength=CLUSTERS))]).astype(np.int32)
    assert (padded.data == 0).sum() == 50
    assert loss(plain(tmp_path / "m.pkl", padded)) == wanted


def test_new_style_array(clustered: Any, tmp_path: Path) -> None:
    loss, assignment, wanted, plain = clustered
    path = plain(tmp_path / "m.pkl", scipy.sparse.csr_array(matrix_of(assignment)))
    assert any(argument == "csr_array" for _, argument, _ in pickletools.genops(path.read_bytes()))
    assert loss(path) == wanted


def test_entries_that_no_cluster_lists_are_in_the_first(clustered: Any, tmp_path: Path) -> None:
    """The original's default: also for entries beyond the matrix's columns, which end at the last listed entry."""
    loss, assignment, _, plain = clustered
    kept = assignment[: len(assignment) // 2]
    short = matrix_of(kept)
    filled = np.where(np.arange(len(assignment)) < len(kept), assignment, 0)
    listed = matrix_of(filled)
    half = listed.shape[1] // 2
    inside = [row[row < half] for row in np.split(listed.indices, listed.indptr[1:-1])]  # cluster 0 lists no others
    listed.indices = np.concatenate(inside)
    listed.indptr = np.concatenate([[0], np.cumsum([len(row) for row in inside])]).astype(np.int32)
    listed.data = np.ones(len(listed.indices), np.int64)
    assert short.shape[1] < listed.shape[1] == len(assignment)
    assert loss(plain(tmp_path / "short.pkl", short)) == loss(plain(tmp_path / "listed.pkl", listed))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({0: {1, 2}}, "a pickled dict"),
        ([[1, 2], [3]], "a pickled list"),
        (np.ones((3, 4)), "a pickled ndarray"),
        (scipy.sparse.csc_matrix(np.eye(4)), "a pickled scipy.sparse._csc.csc_matrix"),
        (scipy.sparse.coo_matrix(np.eye(4)), "a pickled scipy.sparse._coo.coo_matrix"),
        (scipy.sparse.csr_matrix((40, 10**6)), "members up to entry 999999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_one_sentence(store: Any, tmp_path: Path, content: Any, found: str) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(content))
    index = faiss.IndexFlatL2(16)
    index.add(store.keys)
    faiss.write_index(index, str(tmp_path / "flat.index"))
    command = [store.world.data, "--path", store.checkpoint, "--cpu", "--gen-subset", "valid", "--knnlm"]
    command += ["--members", path, "--dstore-filename", store.write(tmp_path / "dstore")]
    command += ["--indexfile", tmp_path / "flat.index"]
    error = store.world.run("eval_lm", command).error
    assert f"m.pkl: found {found}" in error


@pytest.mark.parametrize("damage", ["bounds", "outside", "negative", "lengths", "floats", "missing"])
def test_damaged_matrices_are_one_sentence(store: Any, tmp_path: Path, damage: str) -> None:
    from fairseq.errors import BadFile
    from fairseq.retrieval.clusters import load_clusters

    matrix = matrix_of(np.arange(store.size) % CLUSTERS)
    if damage == "bounds":
        matrix.indptr[3], matrix.indptr[4] = matrix.indptr[4], matrix.indptr[3]
    elif damage in ("outside", "negative"):
        matrix.indices[7] = store.size if damage == "outside" else -1
    elif damage == "lengths":
        matrix.data = matrix.data[:-1]
    elif damage == "floats":
        matrix.indices = matrix.indices.astype(np.float64)
    else:
        del matrix.__dict__["indices"]
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(BadFile, match=r"m\.pkl: found "):
        load_clusters(str(tmp_path / "m.pkl"), store.size)
