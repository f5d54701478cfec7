"""Greedy merging (He et al., 2021, algorithm 1): an entry absorbs those of its nearest neighbours that have its value.

Entries are visited in random order. An entry that has not been absorbed absorbs each of its K nearest neighbours that
has the same value and has neither been absorbed nor absorbed others. The remaining entries can replace the datastore,
each with a weight (the number of entries merged into it); or the groups can serve RetoMaton as small clusters, all of
whose members have the same value.

This is a loop in which each iteration depends on earlier ones, and a compiled loop runs it in this form. Without numba,
entries are processed in rounds: each round takes all entries that no earlier entry of the order can still affect. The
result is the same, because an iteration depends only on the weights of the entry and of its candidates."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq.errors import BadFile
from fairseq.files.array_stream import ArrayStream, open_array, progress, rows_done
from fairseq.files.atomic_io import require_free_space, staged, temporary_path
from fairseq.files.checksums import check_opened
from fairseq.files.number_checks import require_range
from fairseq.files.progress import write_progress
from fairseq.files.sidecar import read_sidecar, write_sidecar
from fairseq.retrieval import kernels
from fairseq.retrieval.datastore import Datastore, weights_path
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.index import Index

logger = logging.getLogger(__name__)

KIND = "neighbours"
REMEDY = "delete the file to search again"
SEARCH_BATCH = 3072
SAFE_POINT_SECONDS = 30.0
ROUND_ROWS = 1 << 20  # entries whose neighbours are processed at a time
SAME_FOR_MERGED = ("weights", "vocabulary", "key_type", "key_module", "data")  # in the merged one's sidecar too
COPY_ROWS = 1 << 16


@dataclass
class Merge:
    """weights (N,) int64: number of entries merged into each entry (itself included), 0 for absorbed ones; absorber
    (N,) int64: the entry that absorbed each entry, itself for those that remain."""

    weights: NDArray[np.int64]
    absorber: NDArray[np.int64]

    @property
    def kept(self) -> NDArray[np.int64]:
        """Ids of the remaining entries, ascending."""
        return np.flatnonzero(self.weights)

    def assignment(self) -> NDArray[np.int64]:
        """(N,): the cluster of each entry; clusters are numbered in ascending order of their remaining entries."""
        return (np.cumsum(self.weights > 0) - 1)[self.absorber]


def merge(neighbours: NDArray[Any], values: NDArray[Any], count: int, seed: int = 22) -> Merge:
    """Merges entries by the first `count` + 1 of their neighbours (N, k), which usually include the entry itself;
    values (N,)."""
    size = len(values)
    order = np.random.default_rng(seed).permutation(size)
    weights, absorber = np.ones(size, np.int64), np.arange(size)
    if kernels.AVAILABLE:
        _merge_in_order(order, np.asarray(neighbours), np.asarray(values), count + 1, weights, absorber)
    else:
        _merge_in_rounds(order, neighbours, np.asarray(values), count + 1, weights, absorber)
    return Merge(weights, absorber)


@kernels.compiled
def _merge_in_order(
    order: np.ndarray,
    neighbours: np.ndarray,
    values: np.ndarray,
    width: int,
    weights: np.ndarray,
    absorber: np.ndarray,
) -> None:
    """Entries absorb, in the given order, those of their first `width` neighbours (N, k) that have their value and
    weight 1; weights (N,) and absorber (N,) are changed in place."""
    for entry in order:
        if weights[entry] == 0:
            continue
        for column in range(width):
            other = neighbours[entry, column]
            if other >= 0 and other != entry and weights[other] == 1 and values[other] == values[entry]:
                weights[other] = 0
                absorber[other] = entry
                weights[entry] += 1


def _merge_in_rounds(
    order: NDArray[np.int64],
    neighbours: NDArray[Any],
    values: NDArray[Any],
    width: int,
    weights: NDArray[np.int64],
    absorber: NDArray[np.int64],
) -> None:
    """`_merge_in_order` in rounds, in place. `first` is, for every entry, the smallest rank of the waiting entries that
    can change it; an entry can be processed when its rank is the smallest at itself and at all its candidates."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    waiting = order
    while len(waiting):
        first = torch.full((len(order),), len(order), dtype=torch.int64)
        first[torch.from_numpy(waiting)] = torch.from_numpy(rank[waiting])
        parts = [waiting[start : start + ROUND_ROWS] for start in range(0, len(waiting), ROUND_ROWS)]
        for entries in parts:
            row, other = _candidates(entries, neighbours, values, width, weights)
            first.scatter_reduce_(0, torch.from_numpy(other), torch.from_numpy(rank[entries[row]]), "amin")
        leader = first.numpy()
        left = []
        for entries in parts:
            row, other = _candidates(entries, neighbours, values, width, weights)
            ready = leader[entries] == rank[entries]
            blocked = row[leader[other] != rank[entries[row]]]
            ready[blocked] = False
            taken = ready[row]
            into, what = entries[row[taken]], other[taken]
            weights[what], absorber[what] = 0, into
            np.add.at(weights, into, 1)
            left.append(entries[~ready & (weights[entries] > 0)])
        waiting = np.concatenate(left)


def _candidates(
    entries: NDArray[np.int64], neighbours: NDArray[Any], values: NDArray[Any], width: int, weights: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, other): for entries[row], each distinct entry that it may absorb with the present weights."""
    near = np.array(neighbours[entries, :width], np.int64)
    near.sort(axis=1)
    fits = (near >= 0) & (near != entries[:, None]) & (values[near] == values[entries][:, None]) & (weights[near] == 1)
    fits[:, 1:] &= near[:, 1:] != near[:, :-1]
    row, column = np.nonzero(fits)
    return row, near[row, column]


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours of every entry


def dump_neighbours(
    datastore: Datastore, index: Index, k: int, path: str, identity: dict[str, Any], show_progress: bool = True
) -> NDArray[np.int32]:
    """The `k` nearest entries of every key, (N, k) int32, memory-mapped from the `.npy` file `path`. The file is
    computed, resumably, when it is not complete, or was made for another `identity` (plain values)."""
    info = json.loads(json.dumps({"k": k, "entries": datastore.size, "identity": identity}))
    stored = read_sidecar(path, KIND, {"k": int})
    if stored is None or {**stored, **info} != stored:
        if stored is not None:
            logger.warning("%s: the neighbours of other keys or of another index; searching again", path)
            os.unlink(path + ".json")
        _search_all(datastore, index, k, path, info, show_progress)
    check_opened(path, {"neighbours": path}, whole=True, expected=True, remedy=REMEDY)
    neighbours = open_array(path, ("<i4",), (datastore.size, k))
    require_range(path, neighbours, -1, datastore.size, "entries", REMEDY)
    return neighbours


def _search_all(
    datastore: Datastore, index: Index, k: int, path: str, info: dict[str, Any], show_progress: bool
) -> None:
    datastore.require_keys("searching for every key")
    progress_path = path + ".progress.json"
    done, (digest,) = rows_done(progress_path, info)
    require_free_space(path, (datastore.size - done) * k * 4, "the list of neighbours")
    try:
        stream = ArrayStream(path, "<i4", (k,), done, digest)
    except BadFile as error:  # the file of the earlier run is gone, or has changed
        logger.warning("%s; searching again from the beginning", error)
        done, stream = 0, ArrayStream(path, "<i4", (k,))
    safe = time.monotonic()
    with tqdm(
        total=datastore.size, initial=done, unit="keys", unit_scale=True, disable=None if show_progress else True
    ) as bar:
        for start in range(done, datastore.size, SEARCH_BATCH):
            queries = torch.from_numpy(datastore.read_keys(slice(start, start + SEARCH_BATCH)))
            found = index.search(queries, k)[1]
            stream.append(found.masked_fill(found >= datastore.size, -1).cpu().numpy())  # empty rows at the end
            bar.update(len(queries))
            if time.monotonic() - safe > SAFE_POINT_SECONDS:
                stream.flush()
                write_progress(progress_path, progress(info, [stream]))
                safe = time.monotonic()
    write_sidecar(path, KIND, {**info, "content": {"neighbours": stream.finish()}})
    if os.path.exists(progress_path):
        os.unlink(progress_path)


# ---------------------------------------------------------------------------------------------------------------------
# A smaller datastore


def write_merged(datastore: Datastore, result: Merge, prefix: str, info: dict[str, Any]) -> None:
    """Writes the remaining entries' keys, values and weights (raw int64 (n, 1)) as a datastore `prefix`."""
    keys, kept = datastore.require_keys("copying them"), result.kept
    with staged(weights_path(prefix)) as stream:
        stream.write(result.weights[kept].astype("<i8").tobytes())
    inherited = {name: datastore.info[name] for name in SAME_FOR_MERGED if name in datastore.info}
    identity = {**inherited, **info, "of": datastore.info or {"rows": datastore.size}}
    try:
        writer = DatastoreWriter(prefix, len(kept), keys.shape[1], keys.dtype == np.float16, identity)
        try:
            for start in range(writer.written, len(kept), COPY_ROWS):
                rows = kept[start : start + COPY_ROWS]
                writer.append(np.asarray(keys[rows]), np.asarray(datastore.values[rows]))
            writer.finish({**identity, "vote_weights": True}, {"weights": weights_path(prefix)})
        finally:
            writer.close()
    finally:
        temporary_path(weights_path(prefix)).unlink(missing_ok=True)
