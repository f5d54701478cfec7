"""Clusters of similar keys, the states of the automaton: entry -> cluster -> members, as flat arrays.

There are two forms on disk: the pickled SciPy CSR matrix that the original's `--members` takes (rows are clusters,
columns are entries), which is read without executing code, and a folder of plain `.npy` arrays, which are
memory-mapped."""

from __future__ import annotations

import contextlib
import os
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile
from fairseq.files import safe_pickle
from fairseq.files.array_files import map_array
from fairseq.files.atomic_io import delay_interrupts, publish, staged, temporary_path
from fairseq.files.checksums import check_opened, describe_content
from fairseq.files.nearby import input_size
from fairseq.files.sidecar import read_sidecar, remove_sidecar, write_sidecar
from fairseq.refusals import refuse

if TYPE_CHECKING:
    import scipy.sparse

KIND = "clusters"
MEMBERS_KIND = "members"
ARRAYS = ("indptr", "members", "cluster_of")
TYPES = ("<i4", "<i8")
CHECKED_ENTRIES = 1 << 22  # arrays of larger folders with a sidecar are checked when used, not on opening


@dataclass
class Clusters:
    """Cluster c has the entries members[indptr[c]:indptr[c + 1]], ascending; entry i is in cluster_of[i].

    indptr: (C + 1,) int64; members: (N,) int32 or int64; cluster_of: (N,) int32. An entry that is in no cluster has
    cluster_of 0: this behaviour of the original affects its results and is therefore kept.

    source: the file that the arrays come from. When a large folder is opened, only the lengths of its arrays are
    checked. Code that uses their numbers as indices must check those that it reads (`require`), or all of them
    (`check`)."""

    indptr: NDArray[Any]
    members: NDArray[Any]
    cluster_of: NDArray[Any]
    source: str = "--members"

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.indptr) - 1

    def check(self) -> None:
        """BadFile unless every number is in range; reads all arrays."""
        _check_arrays(self.source, self.indptr, self.members, len(self.cluster_of))
        own = self.cluster_of
        self.require(not len(own) or (int(own.min()) >= 0 and int(own.max()) < self.count))

    def require(self, fine: bool) -> None:
        """BadFile unless `fine`, the result of a caller's check of numbers from the arrays."""
        if not fine:
            expected = f"{self.count} clusters of the entries 0 to {len(self.cluster_of) - 1}"
            raise BadFile(self.source, "clusters or entries out of range", expected, "cluster again with kmeans.py")

    @classmethod
    def from_assignment(
        cls, assignment: NDArray[Any], count: int | None = None, size: int | None = None
    ) -> Clusters:
        """Clusters from the cluster number of each entry, (N,) integers. Further entries up to `size` are in no
        cluster."""
        assignment = np.asarray(assignment)
        if len(assignment) and assignment.min() < 0:
            raise ValueError("cluster numbers must not be negative")
        count = (int(assignment.max(initial=-1)) + 1) if count is None else count
        indptr = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(assignment, minlength=count), out=indptr[1:])
        members: NDArray[Any] = np.argsort(assignment, kind="stable").astype(index_dtype(len(assignment)))
        cluster_of = np.zeros(max(size or 0, len(assignment)), np.int32)
        cluster_of[: len(assignment)] = assignment
        return cls(indptr, members, cluster_of)

    @classmethod
    def from_csr(cls, matrix: Any, size: int, path: str) -> Clusters:
        """Clusters from a CSR matrix whose rows are clusters and whose columns are entries of a datastore of `size`.

        Members keep the order in which each row stores them. All arrays are checked before they are used."""
        members: NDArray[Any]
        parts = [vars(matrix).get(name) for name in ("indptr", "indices", "data")]
        # Only genuine arrays: another object with an array interface could make NumPy read arbitrary addresses.
        if not all(type(part) is np.ndarray and part.dtype.kind in "biuf" and part.ndim == 1 for part in parts):
            found = f"parts that are {', '.join(_kind_of(part) for part in parts)}"
            raise BadFile(path, found, "a CSR layout of flat arrays", "cluster again with kmeans.py")
        indptr, members, data = parts
        shape = vars(matrix).get("_shape")
        rows: Any
        columns: Any
        rows, columns = shape if isinstance(shape, tuple) and len(shape) == 2 else (None, None)
        if not all(type(number) is int for number in (rows, columns)):
            found = f"a matrix of shape {shape!r:.80}"
            raise BadFile(path, found, "a CSR layout", "cluster again with kmeans.py")
        _check_arrays(path, indptr, members, size)
        if data.shape != members.shape or len(indptr) != rows + 1:
            found = f"{len(data)} values and {len(indptr)} row bounds"
            raise BadFile(path, found, f"{len(members)} and {rows + 1}", "cluster again with kmeans.py")
        if columns > size:
            raise BadFile(path, f"members up to entry {columns - 1}", f"entries below {size}", "check --dstore-size")
        if rows > columns and len(members) > columns and int(np.diff(indptr).max()) <= 1:
            found = f"{rows} rows of one entry each, of {columns}: entries x clusters"
            raise BadFile(path, found, "clusters x entries", "transpose it: scipy.sparse.csr_matrix(matrix.T)")
        indptr, members = indptr.astype(np.int64), members.astype(index_dtype(size), copy=False)
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise BadFile(path, "values that are not finite", "ones", "cluster again with kmeans.py")
        if not data.all():  # stored zeros are no members
            kept = data != 0
            indptr = np.concatenate([[0], np.cumsum(kept)])[indptr]
            members = members[kept]
        seen = np.zeros(size, np.bool_)
        seen[members] = True
        if (distinct := int(np.count_nonzero(seen))) < len(members):
            found = f"{len(members)} members that are {distinct} entries"
            refuse(BadFile(path, found, "each entry once", "cluster again with kmeans.py, or go on with --force"))
        cluster_of = np.zeros(size, np.int32)
        cluster_of[members] = np.repeat(np.arange(len(indptr) - 1, dtype=np.int32), np.diff(indptr))
        return cls(indptr, members, cluster_of, path)

    def to_csr(self) -> scipy.sparse.csr_matrix:
        """The matrix that the original pickles: int64 ones, int32 indices, members ascending in each row."""
        data = np.ones(len(self.members), np.int64)
        entries = int(self.members.max(initial=-1)) + 1
        import scipy.sparse  # imported here because it takes time, and only reading and writing members needs it

        return scipy.sparse.csr_matrix((data, self.members, self.indptr), shape=(self.count, entries))


def _kind_of(part: Any) -> str:
    return f"{part.ndim}-dimensional {part.dtype.str}" if type(part) is np.ndarray else type(part).__name__


def index_dtype(size: int) -> type:
    """int32 while entry ids fit, else int64."""
    return np.int32 if size <= np.iinfo(np.int32).max else np.int64


def _check_arrays(path: str, indptr: NDArray[Any], members: NDArray[Any], size: int) -> None:
    plain = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (indptr, members))
    if not plain or not (
        len(indptr) and indptr[0] == 0 and indptr[-1] == len(members) and bool((indptr[1:] >= indptr[:-1]).all())
    ):
        raise BadFile(path, "row bounds that do not fit the members", "a CSR layout", "cluster again with kmeans.py")
    if len(members) and (members.min() < 0 or members.max() >= size):
        raise BadFile(
            path,
            f"member ids from {members.min()} to {members.max()}",
            f"ids from 0 to {size - 1}",
            "check --dstore-size",
        )


def load_clusters(path: str, size: int) -> Clusters:
    """Reads `--members` for a datastore of `size`: a CSR pickle, or the folder of arrays that `save_clusters` wrote."""
    if os.path.isdir(path):
        return _load_arrays(path, size)
    input_size(path, "check --members, or make it with kmeans.py")
    check_opened(path, {"members": path})
    expected = "a pickled SciPy CSR matrix, clusters x entries"
    try:
        matrix = safe_pickle.load(path)
    except safe_pickle.RefusedGlobal as error:
        if error.name.startswith("scipy.sparse"):
            raise BadFile(path, f"a pickled {error.name}", expected, "convert it with .tocsr()") from error
        raise
    import scipy.sparse

    if type(matrix) not in (scipy.sparse.csr_matrix, scipy.sparse.csr_array):
        raise BadFile(path, f"a pickled {type(matrix).__name__}", expected)
    return Clusters.from_csr(matrix, size, path)


def _load_arrays(folder: str, size: int) -> Clusters:
    info = read_sidecar(os.path.join(folder, KIND), KIND, {"entries": int, "clusters": int})
    if info is None:
        raise BadFile(folder, "no clusters.json", "a folder that kmeans.py wrote", "cluster again")
    check_opened(os.path.join(folder, KIND), {name: os.path.join(folder, name + ".npy") for name in ARRAYS})
    arrays = {}
    for name in ARRAYS:
        arrays[name] = map_array(os.path.join(folder, name + ".npy"), "cluster again with kmeans.py")
    lengths = tuple(arrays[name].shape for name in ARRAYS)
    listed = (int(arrays["indptr"][-1]),) if lengths[0] == (info["clusters"] + 1,) else None
    if listed != lengths[1] or lengths[2] != (size,):
        raise BadFile(
            folder, f"arrays of lengths {lengths}", f"clusters of a datastore of {size} entries", "check --members"
        )
    types = [arrays[name].dtype.str for name in ARRAYS]
    if not set(types) <= set(TYPES):
        raise BadFile(folder, f"arrays of types {', '.join(types)}", " or ".join(TYPES), "cluster again")
    clusters = Clusters(**arrays, source=folder)
    if size <= CHECKED_ENTRIES or "content" not in info:
        clusters.check()
    return clusters


def save_clusters(folder: str, clusters: Clusters, info: dict[str, Any]) -> None:
    """Writes the arrays as `.npy` files into `folder`. The files are renamed when all are complete, and the sidecar is
    written last; earlier files stay unchanged until then."""
    paths = {name: os.path.join(folder, name + ".npy") for name in ARRAYS}
    with contextlib.ExitStack() as stack:
        for name, path in paths.items():
            np.save(stack.enter_context(staged(path)), getattr(clusters, name), allow_pickle=False)
    counts = {"entries": len(clusters.cluster_of), "clusters": clusters.count}
    content = {name: describe_content(temporary_path(path)) for name, path in paths.items()}
    with delay_interrupts():
        remove_sidecar(os.path.join(folder, KIND))
        for path in paths.values():
            publish(temporary_path(path), path)
        write_sidecar(os.path.join(folder, KIND), KIND, {**info, **counts, "content": content})


def save_members_pickle(path: str, clusters: Clusters, info: dict[str, Any] | None = None) -> None:
    """Writes the pickled CSR matrix that the original RetoMaton's `--members` reads, and a sidecar with the fields
    `info`, if given."""
    with staged(path) as stream:
        pickle.dump(clusters.to_csr(), stream, protocol=4)
    content = {"members": describe_content(temporary_path(path))}
    with delay_interrupts():
        remove_sidecar(path)
        publish(temporary_path(path), path)
        if info is not None:
            write_sidecar(path, MEMBERS_KIND, {**info, "content": content})
