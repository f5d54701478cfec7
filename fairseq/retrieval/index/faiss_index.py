"""`FaissIndex` wraps any index file that FAISS can read. Distances to given entries are computed from IVFPQ codes where
the index has them (`pq_codes`), otherwise from vectors that FAISS reconstructs in batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import BadFile, BadFlag
from fairseq.files.checksums import check_opened
from fairseq.retrieval import kernels
from fairseq.retrieval.entries import bounds_of_rows
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.index.faiss_files import faiss_errors, read_faiss_index
from fairseq.retrieval.index.pq_codes import PQCodes
from fairseq.retrieval.kernels import exact_kernels, intrinsics

logger = logging.getLogger(__name__)

RECONSTRUCT_CHUNK = 1 << 24  # floats reconstructed at a time: 64 MB
COMPARED_QUERIES, COMPARED_ENTRIES = 4, 8  # for the check that distances equal those of a search
TOLERANCE = 1e-3  # relative; errors of single precision are far smaller, those of fast scans are larger
OF_BITS = ("IndexLSH", "IndexIVFSpectralHash")  # kinds of index whose search returns Hamming distances
REMOVED_EXAMINED = 1 << 16  # keys with which the last entry of an incomplete index is compared
FAR = 1e30  # squared distance of an entry that the index lacks: its weight is 0, but the distance is finite


class FaissIndex:
    """An open FAISS index file. size: number of entries of the datastore, below which all ids must be.

    `core` is the innermost index, inside the transforms and id maps that are wrapped around it."""

    exact = False

    def __init__(self, path: str, size: int, probe: int | None = None, device: torch.device | str = "cpu") -> None:
        faiss = require_faiss()
        self.path, self.size, self.device = path, size, torch.device(device)
        check_opened(path, {"index": path})
        self.faiss_index = read_faiss_index(path)
        self.dimension = int(self.faiss_index.d)
        self.inner_product = self.faiss_index.metric_type == faiss.METRIC_INNER_PRODUCT
        ivf = faiss.try_extract_index_ivf(self.faiss_index)  # has the static type IndexIVF, even for an IVFPQ
        self.ivf = None if ivf is None else faiss.downcast_index(ivf)
        self.count = int(self.faiss_index.ntotal)
        self.core, self._transforms, self._id_map = _unwrapped(self.faiss_index, path)
        self._require_known_metric()
        if self._id_map is not None:
            _check_ids([self._id_map], size, path)
        self._codes: PQCodes | None = None
        self._compared = self._mapped = False
        if probe is not None and self.ivf is not None:
            if probe > self.ivf.nlist:
                logger.warning("--probe %d: %s has %d lists, and all of them are searched", probe, path, self.ivf.nlist)
            self.ivf.nprobe = min(probe, self.ivf.nlist)
        if self.count == 0 and size:
            trained = path.endswith(".trained")
            remedy = "give the file that build_dstore.py wrote in the end" if trained else "build it again"
            raise BadFile(path, "an index without entries", f"one of the datastore's {size}", remedy)
        if self.count > size:
            expected = f"at most the datastore's {size}"
            raise BadFile(path, f"{self.count} entries", expected, "check --dstore-size, or which index belongs to it")
        if self.count < size:
            logger.warning("%s holds %d of the datastore's %d entries%s", path, self.count, size, self._numbering())

    @property
    def _by_position(self) -> bool:
        """Whether the number of an entry is its position in the index, so that nothing tells which ones are missing."""
        return self._id_map is None and self.ivf is None

    def _numbering(self) -> str:
        if not self._by_position:
            return ""
        return (
            f": an {type(self.core).__name__} numbers its entries by position, so this is right only where the last "
            "ones are missing; if others were removed, build it again, with an IndexIDMap or without removing any"
        )

    def check_positions(self, keys: NDArray[Any]) -> None:
        """BadFile when entries were removed from the middle of an index whose numbers are positions: its last entry is
        then a later row of `keys` (N, D) than its number says."""
        faiss = require_faiss()
        if not self._by_position or not 0 < self.count < self.size or not isinstance(self.core, faiss.IndexFlat):
            return
        last = self.count - 1
        rows = np.asarray(keys[last : min(self.size, last + REMOVED_EXAMINED)], np.float32)
        vectors = self._transformed(torch.from_numpy(rows)).cpu().numpy() if self._transforms else rows
        own = self.core.reconstruct(last)
        same = np.isclose(vectors, own, rtol=1e-3, atol=1e-5).all(1)
        if not same[0] and same.any():
            found = f"row {last + int(same.argmax())} of the keys as its entry {last}"
            expected = f"row {last}: entries were removed from this index, after which FAISS numbers the others anew"
            raise BadFile(self.path, found, expected, "build it again from all keys")

    def _require_known_metric(self) -> None:
        """BadFile unless the metric of the index and of `core` is squared L2 distance or inner product."""
        faiss = require_faiss()
        metrics = {self.faiss_index.metric_type, self.core.metric_type}
        if len(metrics) > 1 or not metrics <= {faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT}:
            names = {getattr(faiss, name): name for name in dir(faiss) if name.startswith("METRIC_")}
            found = " and ".join(sorted(str(names.get(metric, metric)) for metric in metrics))
            expected = "METRIC_L2 or METRIC_INNER_PRODUCT"
            raise BadFile(self.path, f"an index of metric {found}", expected, "build it again from the keys")

    def require_own_distances(self) -> None:
        """BadFile for an index whose search returns Hamming distances of codes, not distances of vectors."""
        faiss = require_faiss()
        kinds = tuple(getattr(faiss, name) for name in OF_BITS if hasattr(faiss, name))
        if isinstance(self.core, kinds):
            found = f"an {type(self.core).__name__}, whose search counts bits that differ"
            remedy = "leave out --knn-sim-func, so that distances come from the keys, or build another index"
            raise BadFile(self.path, found, "an index with distances", remedy)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`; runs on the CPU, with FAISS's number of threads."""
        require_width(queries, self.dimension)
        with faiss_errors(self.path, "search"):
            distances, ids = self.faiss_index.search(np.ascontiguousarray(queries.cpu().numpy(), np.float32), k)
        self._check_found(ids)
        return torch.from_numpy(distances).to(self.device), torch.from_numpy(ids).to(self.device)

    def _check_found(self, ids: NDArray[np.int64]) -> None:
        if ids.size and not (ids.min() >= -1 and ids.max() < self.size):
            found, expected = f"entries {ids.min()} to {ids.max()}", f"ids below the datastore's {self.size}"
            raise BadFile(self.path, found, expected, "check which index belongs to it")

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Index.distances`. An entry that is not in the index gets a distance larger than all others."""
        return self._measured(queries, rows, ids, from_codes=True)

    @property
    def rebuilds(self) -> bool:
        """Whether `rebuilt_distances` differ from `distances`, in the last bits."""
        return self.code_table() is not None

    def rebuilt_distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """As `distances`, but with the original's rounding: the sum, by torch, of the squared differences between the
        query and the decoded vector of the entry."""
        return self._measured(queries, rows, ids, from_codes=False)

    def _measured(self, queries: Tensor, rows: Tensor, ids: Tensor, from_codes: bool) -> Tensor:
        require_width(queries, self.dimension)
        if not self._compared and len(queries):
            self._compared = True
            if not self._has_pq_codes():
                self._compare_with_search(queries[:COMPARED_QUERIES])
        if self._transforms:
            queries = self._transformed(queries)
        absent, entries = None, ids
        if self.places is not None:
            ids = self.places[ids].long()
            absent = ids < 0
            ids = ids.clamp(min=0)
        codes = self.code_table()
        if codes is not None and from_codes:
            result = codes.distances(queries, rows, ids)
        elif codes is not None:
            result = pairwise(queries, rows, codes.rebuilt(ids), self.inner_product)
        else:
            result = self._reconstructed_distances(queries, rows, ids, absent)
        if absent is not None:
            result[absent] = -FAR if self.inner_product else FAR
        finite = result.isfinite()
        if not bool(finite.all()):
            found = f"entry {int(entries[~finite][0])}, whose distance is not finite"
            raise BadFile(self.path, found, "entries that are vectors", "build it again from keys that are finite")
        return result

    def _compare_with_search(self, queries: Tensor) -> None:
        """BadFile unless the distances to given entries equal those that a search returns for them. For some kinds of
        index they do not: FAISS reconstructs vectors in another space, or searches with coarser numbers."""
        found, ids = FaissIndex.search(self, queries, COMPARED_ENTRIES)
        rows, columns = (ids >= 0).nonzero(as_tuple=True)
        given = self.distances(queries, rows, ids[rows, columns])
        wanted = found[rows, columns]
        allowed = TOLERANCE * wanted.abs() + 1e-5 * queries[rows].square().sum(1) + 1e-6
        if bool(((given - wanted).abs() <= allowed).all()):
            return
        apart = float(((given - wanted).abs() / wanted.abs().clamp(min=1e-6)).max())
        kind = type(self.core).__name__
        found_text = f"an {kind} whose distances to given entries differ by {100 * apart:.3g}% from those of a search"
        remedy = "leave out --knn-sim-func, so that all distances come from the keys, or use --no-pointer"
        raise BadFile(self.path, found_text, "equal ones, which pointers need", remedy)

    @functools.cached_property
    def places(self) -> Tensor | None:
        """(size,): the number under which `core` stores each entry, -1 for entries that it lacks; None when that number
        is the entry's id."""
        inverted = isinstance(self.core, require_faiss().IndexIVF)
        if self._id_map is None and inverted:
            lacking = _check_ids(_ids_in_lists(self.core), self.size, self.path)
            if not lacking:
                return None
        elif self._id_map is None and self.count == self.size:
            return None
        places = np.full(self.size, -1, np.int32 if self.size <= np.iinfo(np.int32).max else np.int64)
        if self._id_map is not None:
            places[self._id_map] = np.arange(len(self._id_map))
        elif inverted:
            for ids in _ids_in_lists(self.core):
                places[ids] = ids
        else:
            places[: self.count] = np.arange(self.count)
        return torch.from_numpy(places).to(self.device)

    def code_table(self) -> PQCodes | None:
        """The table of IVFPQ codes, read from the index at first use; None when the index has no such codes."""
        if self._codes is None and self._has_pq_codes():
            self._codes = PQCodes(self.core, self.size if self._id_map is None else self.count, self.device)
        return self._codes

    def _has_pq_codes(self) -> bool:
        faiss = require_faiss()
        return isinstance(self.core, faiss.IndexIVFPQ) and self.core.pq.nbits == 8

    def _transformed(self, queries: Tensor) -> Tensor:
        """Queries after the linear transforms (PCA, OPQ) of the index, that is, in the space of `core`'s distances."""
        vectors = queries.cpu().numpy()
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        return torch.from_numpy(vectors).to(self.device)

    def _reconstructed_distances(self, queries: Tensor, rows: Tensor, ids: Tensor, absent: Tensor | None) -> Tensor:
        faiss = require_faiss()
        if isinstance(self.core, faiss.IndexIVFFastScan):  # it would end the process
            found = "an index for fast scanning, whose entries FAISS cannot rebuild"
            raise BadFile(self.path, found, "one whose entries have distances", "use one that build_dstore.py made")
        if isinstance(self.core, faiss.IndexIVF) and not self._mapped:
            gaps = self._id_map is None and self.places is not None  # an array map needs ids without gaps
            with faiss_errors(self.path, "follow"):
                self.core.set_direct_map_type(faiss.DirectMap.NoMap)  # drops the file's own map, which may be wrong
                self.core.set_direct_map_type(faiss.DirectMap.Hashtable if gaps else faiss.DirectMap.Array)
            self._mapped = True
        result = queries.new_empty(len(ids))
        wanted = torch.arange(len(ids), device=ids.device) if absent is None else (~absent).nonzero().squeeze(1)
        for some in wanted.split(max(1, RECONSTRUCT_CHUNK // queries.shape[1])):
            with faiss_errors(self.path, "follow"):
                vectors = self.core.reconstruct_batch(ids[some].cpu().numpy())
            entries = torch.from_numpy(vectors).to(self.device)
            result[some] = pairwise(queries, rows[some], entries, self.inner_product)
        return result

    def describe(self) -> str:
        """One line for the log: type, entries, lists and probe."""
        lists = f", {self.ivf.nlist} lists, probe {self.ivf.nprobe}" if self.ivf is not None else ""
        return f"{type(self.faiss_index).__name__} of {self.count} x {self.dimension}{lists}"


def _unwrapped(index: Any, path: str) -> tuple[Any, list[Any], NDArray[np.int64] | None]:
    """(the innermost index, the transforms of queries before it, the entry ids of its vectors if it has an id map)."""
    faiss = require_faiss()
    transforms: list[Any] = []
    id_map = None
    while True:
        if isinstance(index, faiss.IndexPreTransform):
            transforms += [index.chain.at(number) for number in range(index.chain.size())]
        elif isinstance(index, faiss.IndexIDMap):
            if id_map is not None:
                raise BadFile(path, "an id map inside another", "at most one", "build the index again")
            id_map = faiss.vector_to_array(index.id_map)
        else:
            return index, transforms, id_map
        index = faiss.downcast_index(index.index)


def _ids_in_lists(ivf: Any) -> Iterator[NDArray[np.int64]]:
    """The entry ids of each inverted list that has any, in memory or on disk."""
    faiss = require_faiss()
    for number in range(ivf.nlist):
        count = ivf.invlists.list_size(number)
        if count:
            pointer = ivf.invlists.get_ids(number)
            yield faiss.rev_swig_ptr(pointer, count)
            ivf.invlists.release_ids(number, pointer)


def _check_ids(parts: Iterable[NDArray[np.int64]], size: int, path: str) -> int:
    """The number of entries from 0 to `size` - 1 that are not among the ids in `parts`; BadFile when an id occurs twice
    or is out of range."""
    seen = np.zeros(size, np.bool_)
    count = 0
    for ids in parts:
        if len(ids) and not (ids.min() >= 0 and ids.max() < size):
            found, expected = f"entries {ids.min()} to {ids.max()}", f"ids from 0 to {size - 1}, as the datastore has"
            raise BadFile(path, found, expected, "check which index belongs to it")
        seen[ids] = True
        count += len(ids)
    distinct = int(np.count_nonzero(seen))
    if distinct < count:
        found = f"{count} vectors under {distinct} ids"
        raise BadFile(path, found, "each entry once", "build it again from the keys")
    return size - distinct


def pairwise(queries: Tensor, rows: Tensor, vectors: Tensor, inner_product: bool) -> Tensor:
    """(n,) float32: squared L2 distance, or inner product, of `queries[rows[i]]` and `vectors[i]`."""
    repeated = queries[rows]
    if inner_product:
        return (repeated * vectors).sum(1)
    return (repeated - vectors).square_().sum(1)


def key_distances(keys: np.ndarray, queries: Tensor, rows: Tensor, ids: Tensor, inner_product: bool) -> Tensor:
    """(n,) float32: exact squared L2 distances (or inner products) of queries[rows[i]] and the stored keys[ids[i]].

    keys (N, D), queries (B, D), rows (n,) ascending, ids (n,). An id of -1 reads the last key, as in the original."""
    require_width(queries, keys.shape[1])
    result = queries.new_empty(len(ids))
    half = keys.itemsize == 2
    compiled = intrinsics.READS_FLOAT16 if half else kernels.AVAILABLE
    if compiled and queries.device.type == "cpu" and not inner_product:
        bounds = bounds_of_rows(rows, len(queries)).numpy()
        read = np.asarray(keys.view(np.uint16) if half else keys)
        arrays = (queries.contiguous().numpy(), ids.numpy(), read, result.numpy())
        kernels.run_by_rows(exact_kernels.key_distances, bounds, *arrays)
        return result
    step = max(1, RECONSTRUCT_CHUNK // keys.shape[1])
    host_ids = ids.cpu().numpy()
    for start in range(0, len(ids), step):
        vectors = torch.from_numpy(keys[host_ids[start : start + step]]).to(queries)
        result[start : start + step] = pairwise(queries, rows[start : start + step], vectors, inner_product)
    return result


def require_width(queries: Tensor, width: int) -> None:
    """ValueError unless queries are (B, width)."""
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"found queries of shape {tuple(queries.shape)}, expected (B, {width}) as the keys have")


def check_dimension(index_dimension: int, query_dimension: int, path: str) -> None:
    """BadFlag when the index was built from keys of another width than the model's."""
    if index_dimension != query_dimension:
        raise BadFlag(
            "--indexfile", f"an index of dimension {index_dimension} in {path}", f"the model's {query_dimension}",
            "use the index that was built from this model's datastore",
        )
