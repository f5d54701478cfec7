"""Reading FAISS index files, which may be damaged or hostile. FAISS trusts the sizes inside a file: it would allocate
memory for any size, and search lists that point outside the file. Here each allocation is limited to the file's length
(or 64 MB), and the parts of the index are checked for consistency before anything is searched."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from fairseq.errors import BadFile, unreadable
from fairseq.files.inputs import regular_size
from fairseq.files.names import is_utf8
from fairseq.files.nearby import input_size
from fairseq.files.number_checks import require_range
from fairseq.retrieval.faiss_import import require_faiss

LEAST_LIMIT = 64 << 20
READ_AT_ONCE = 1 << 20  # bytes
REMEDY = "build it again"


def read_faiss_index(path: str) -> Any:
    """Reads an index; inverted lists on disk are looked for beside it. BadFile when FAISS cannot read it, or when its
    parts are inconsistent."""
    faiss = require_faiss()
    size = input_size(path, "check --indexfile, or build it with build_dstore.py")
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
    with faiss_errors(path, "read"):
        with deserialisation_limits(max(size, LEAST_LIMIT)):
            if is_utf8(path):
                index = faiss.read_index(path, flags)
            else:
                with open(path, "rb") as stream:
                    index = faiss.read_index(faiss.PyCallbackIOReader(stream.read, READ_AT_ONCE), flags)
        _check_consistency(index, path)
        _precompute(index)
        return index


def looks_like_an_index(path: str) -> bool:
    """Whether a file begins like a FAISS index: four letters or digits, the first of them an I."""
    with open(path, "rb") as stream:
        kind = stream.read(4)
    return len(kind) == 4 and kind[:1] == b"I" and kind.isalnum()


@contextlib.contextmanager
def faiss_errors(path: str, action: str) -> Iterator[None]:
    """Turns exceptions that FAISS raises about the index in `path` into BadFile."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, AttributeError, TypeError) as error:  # unknown kinds: the last
        found = f"a file that FAISS cannot {action} ({reason(error)})"
        raise unreadable(path, error, found, "a FAISS index", REMEDY) from error


def reason(error: Exception) -> str:
    """FAISS's message without the source location and the failed condition."""
    text = next(iter(str(error).splitlines()), "unknown reason").removesuffix(" (Success)")
    return re.sub(r"^Error in .* at \S+:\d+: (Error: '.*?' failed: )?", "", text)[-160:]


@contextlib.contextmanager
def deserialisation_limits(limit: int) -> Iterator[None]:
    """Limits the size of each vector (in bytes) and each loop (in iterations) when FAISS reads a file. Has an effect
    with FAISS 1.15 and later."""
    faiss = require_faiss()
    kinds = ("vector_byte", "loop")
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    before = [getattr(faiss, f"get_deserialization_{kind}_limit")() for kind in kinds]
    try:
        for kind in kinds:
            getattr(faiss, f"set_deserialization_{kind}_limit")(limit)
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            getattr(faiss, f"set_deserialization_{kind}_limit")(value)


def _parts(index: Any) -> Iterator[Any]:
    """The index and the indexes wrapped inside it, outermost first."""
    faiss = require_faiss()
    for _ in range(16):
        yield index
        if not isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
            return
        index = faiss.downcast_index(index.index)
    raise RuntimeError("too many indexes inside each other")


def _check_consistency(index: Any, path: str) -> None:
    """BadFile when parts of an index that FAISS has read are inconsistent."""
    faiss = require_faiss()
    for part in _parts(index):
        if part.d < 1 or part.ntotal < 0:
            raise BadFile(path, f"{part.ntotal} vectors of dimension {part.d}", "an index", REMEDY)
        if isinstance(part, faiss.IndexPreTransform):
            _check_transforms(part, path)
        if isinstance(part, faiss.IndexIDMap) and part.id_map.size() != part.ntotal:
            raise BadFile(path, f"{part.id_map.size()} ids of {part.ntotal} vectors", "as many", REMEDY)
        if isinstance(part, faiss.IndexHNSW):
            _check_graph(part, path)
        if isinstance(part, faiss.IndexIVF):
            _check_lists(part, path)
            _check_consistency(faiss.downcast_index(part.quantizer), path)
        if isinstance(part, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan):
            _check_quantiser(part, path)


def _check_graph(index: Any, path: str) -> None:
    """BadFile for a graph with numbers out of range: FAISS's search uses them as indices without a check."""
    faiss = require_faiss()
    graph, storage = index.hnsw, index.storage
    levels, begins = (faiss.vector_to_array(part).astype(np.int64) for part in (graph.levels, graph.offsets))
    width = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    count = graph.neighbors.size()
    neighbours = faiss.rev_swig_ptr(graph.neighbors.data(), count) if count else np.zeros(0, np.int32)
    vectors = int(index.ntotal)
    good = storage is not None and storage.ntotal == vectors and storage.d == index.d
    good = good and len(levels) == vectors == len(begins) - 1 and len(width) > 0 and -1 <= graph.entry_point < vectors
    if good and vectors:
        good = levels.min() >= 1 and levels.max() < len(width) and -1 <= graph.max_level < levels.max()
        good = bool(good and width[0] == 0 and (np.diff(width) >= 0).all() and begins[0] == 0 and begins[-1] == count)
        good = bool(good and (np.diff(begins) == width[levels]).all())
        good = good and graph.entry_point >= 0 and levels[graph.entry_point] > graph.max_level
    if not good:
        raise BadFile(path, "a graph that does not fit its vectors", "an HNSW index", REMEDY)
    require_range(path, neighbours, -1, vectors, "neighbours in the graph", REMEDY)


def _check_transforms(index: Any, path: str) -> None:
    faiss = require_faiss()
    width = index.d
    for number in range(index.chain.size()):
        transform = faiss.downcast_VectorTransform(index.chain.at(number))
        if transform.d_in != width or transform.d_out < 1:
            raise BadFile(path, f"a transform of {transform.d_in} numbers", f"one of {width}", REMEDY)
        width = transform.d_out
        if isinstance(transform, faiss.LinearTransform):
            have = (transform.A.size(), transform.b.size())
            wanted = (transform.d_in * transform.d_out, transform.d_out if transform.have_bias else have[1])
            if have != wanted:
                raise BadFile(path, f"a transform with {have} numbers", f"{wanted}", REMEDY)
    if index.index.d != width:
        raise BadFile(path, f"vectors of {index.index.d} numbers behind a transform to {width}", "as many", REMEDY)


def _check_lists(ivf: Any, path: str) -> None:
    faiss = require_faiss()
    quantizer, lists = ivf.quantizer, ivf.invlists
    found = (quantizer.ntotal, quantizer.d)
    if found != (ivf.nlist, ivf.d):
        raise BadFile(path, f"{found[0]} centroids of dimension {found[1]}", f"{ivf.nlist} of {ivf.d}", REMEDY)
    fast = isinstance(ivf, faiss.IndexIVFFastScan)  # its lists contain blocks of several codes, not single codes
    if lists is None or lists.nlist != ivf.nlist or (lists.code_size != ivf.code_size and not fast):
        raise BadFile(path, "inverted lists of another index", f"{ivf.nlist} lists", REMEDY)
    lists = faiss.downcast_InvertedLists(lists)
    if fast:
        _check_blocks(ivf, lists, path)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        _check_lists_on_disk(lists, path)
    count = sum(lists.list_size(number) for number in range(ivf.nlist))
    if count != ivf.ntotal:
        raise BadFile(path, f"lists with {count} entries", f"{ivf.ntotal} as its head says", REMEDY)


def _check_blocks(ivf: Any, lists: Any, path: str) -> None:
    """BadFile unless the lists have the block sizes that a fast scan reads: blocks of 4-bit codes, stored by pairs of
    sub-quantisers."""
    faiss = require_faiss()
    found = None
    if isinstance(lists, faiss.BlockInvertedLists):
        found = (ivf.nbits, lists.n_per_block, lists.block_size, ivf.M2)
    expected = (4, ivf.bbs, ivf.bbs * ivf.M2 // 2, -(-ivf.M // 2) * 2)
    if found != expected or ivf.bbs < 32 or ivf.bbs % 32:
        raise BadFile(path, f"blocks of sizes {found}", f"{expected}", REMEDY)


def _check_lists_on_disk(lists: Any, path: str) -> None:
    """BadFile for lists that extend beyond their file, which would end the process when they are searched."""
    data = os.path.join(os.path.dirname(path), os.path.basename(lists.filename))
    size = regular_size(data, f"copy it beside {path}")
    if lists.totsize > size:
        raise BadFile(data, f"{size} bytes", f"{lists.totsize} as {path} says", "copy both files again")
    entry = lists.code_size + 8
    for number in range(lists.nlist):
        one = lists.lists.at(number)
        if one.size and (one.size > one.capacity or one.offset + one.capacity * entry > lists.totsize):
            raise BadFile(path, f"list {number} outside {data}", "lists inside", "copy both files again")


def _check_quantiser(ivfpq: Any, path: str) -> None:
    pq = ivfpq.pq
    found = (pq.d, pq.M * pq.dsub, pq.centroids.size(), pq.code_size)
    expected = (ivfpq.d, ivfpq.d, ivfpq.d * pq.ksub, ivfpq.code_size)
    if found != expected or not 1 <= pq.nbits <= 24 or pq.ksub != 1 << pq.nbits:
        raise BadFile(path, f"a quantiser with sizes {found}", f"{expected}", REMEDY)


def _precompute(index: Any) -> None:
    """Computes the look-up tables that FAISS would compute while reading an IVFPQ; here after the checks, as they can
    be large."""
    faiss = require_faiss()
    for part in _parts(index):
        if isinstance(part, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan) and part.by_residual:
            part.precompute_table()
