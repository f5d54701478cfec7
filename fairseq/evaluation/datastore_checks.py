"""Checks of a datastore, its index and its clusters that need no language model. Each function checks one property and
yields findings in plain sentences. `fairseq.evaluation.doctor` adds the checks that need the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import BadFile, UserError
from fairseq.files.checksums import verify
from fairseq.files.sidecar import FOLDER_KINDS, read_any_sidecar
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.datastore import Datastore, value_range
from fairseq.retrieval.index import Index
from fairseq.retrieval.index.recall import exact_neighbours, noisy_keys, recall_of

OK, UNKNOWN, SUSPICIOUS, WRONG = "ok", "not known", "suspicious", "wrong"
CHUNK = 1 << 22
SAMPLED_ROWS = 1 << 14
QUERIES = 64
STRETCH = 32  # tokens: texts hardly ever repeat that many by chance
PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Finding:
    """level: ok, not known (nothing was compared), suspicious (results may be wrong) or wrong (results are wrong);
    text: one sentence."""

    level: str
    text: str


def check_values(datastore: Datastore, vocabulary: int) -> Iterator[Finding]:
    """Values that are not words of the dictionary, and all-zero rows at the end, which must not count as entries."""
    low, high = value_range(datastore.values)
    zeros = sum(int((datastore.values[at : at + CHUNK] == 0).sum()) for at in range(0, datastore.size, CHUNK))
    if low < 0 or high >= vocabulary:
        yield Finding(WRONG, f"values from {low} to {high}, but the dictionary has the words 0 to {vocabulary - 1}")
    else:
        yield Finding(OK, f"all {datastore.size} values are words of the dictionary")
    if datastore.keys is None:
        return
    empty = datastore.size - datastore.filled
    if empty:
        yield Finding(SUSPICIOUS, f"the last {empty} rows are all zero: the size is larger than what was stored")
    elif zeros > datastore.size // 2:
        yield Finding(SUSPICIOUS, f"{zeros} of {datastore.size} values are 0, a word that no text contains")


def sampled_rows(size: int, count: int = SAMPLED_ROWS, seed: int = 0) -> NDArray[np.int64]:
    """Distinct rows in ascending order."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(size, min(size, count), replace=False, shuffle=False))


def check_keys(datastore: Datastore) -> Iterator[Finding]:
    """Keys that are not finite, all zero, or all equal, in a sample of rows."""
    if datastore.keys is None or not datastore.filled:
        yield Finding(UNKNOWN, "the keys were not opened, so they were not looked at")
        return
    rows = sampled_rows(datastore.filled)
    keys = np.asarray(datastore.keys[rows], np.float32)
    bad = ~np.isfinite(keys).all(1)
    if bad.any():
        first = int(rows[bad.argmax()])
        yield Finding(WRONG, f"{int(bad.sum())} of {len(rows)} sampled keys are not finite (row {first} for one)")
        return
    try:
        datastore.read_keys(rows)
    except BadFile as error:
        yield Finding(WRONG, str(error))
        return
    zero = ~keys.any(1)
    if zero.any():
        yield Finding(SUSPICIOUS, f"{int(zero.sum())} of {len(rows)} sampled keys are all zero")
    if len(rows) > 1 and (keys == keys[0]).all():
        yield Finding(WRONG, "all sampled keys are the same")
    else:
        yield Finding(OK, f"{len(rows)} sampled keys are finite and differ")


def check_index(index: Index, datastore: Datastore, k: int = 10) -> Iterator[Finding]:
    """Whether the index has all entries, and its recall against exact search for queries that are noisy entries."""
    entries = datastore.filled
    if index.count < entries:
        missing = entries - index.count
        yield Finding(SUSPICIOUS, f"the index holds {index.count} of {entries} entries; {missing} are never found")
    elif index.count > entries:
        yield Finding(SUSPICIOUS, f"the index holds {index.count - entries} empty rows besides the {entries} entries")
    else:
        yield Finding(OK, f"the index holds all {entries} entries")
    if datastore.keys is None or not entries:
        yield Finding(UNKNOWN, "recall is not checked, as the keys were not opened")
        return
    keys, k = datastore.keys[:entries], min(k, entries)
    queries = noisy_keys(keys, QUERIES)
    if not len(queries):
        yield Finding(UNKNOWN, "recall is not checked, as no sampled key is finite")
        return
    _, found = index.search(queries, k)
    recall = recall_of(found, exact_neighbours(keys, queries, k, index.inner_product)).at_k
    level = OK if recall >= 0.5 else SUSPICIOUS if recall >= 0.1 else WRONG
    remedy = "" if level == OK else ": raise --probe, or check that the index was built from these keys"
    said = f"the index finds {100 * recall:.0f}% of the {k} nearest entries of {len(queries)} keys"
    yield Finding(level, said + remedy)
    yield from _check_distances(index, queries, found)


def _check_distances(index: Index, queries: Tensor, found: Tensor) -> Iterator[Finding]:
    """Whether distances to given entries, which pointers use, equal those of the search."""
    distances, ids = index.search(queries, found.shape[1])
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    given = index.distances(queries.to(index.device), rows, ids[rows, columns])
    wanted = distances[rows, columns]
    if not len(rows):
        yield Finding(UNKNOWN, "distances that pointers use are not compared, as the search found nothing")
        return
    apart = ((given - wanted).abs() / wanted.abs().clamp(min=1e-3)).max().item()
    if apart > 1e-2:
        yield Finding(WRONG, f"distances that pointers use differ from those of a search by {100 * apart:.1f}%")
    else:
        yield Finding(OK, "distances that pointers use are those of a search")


def check_devices(first: Index, second: Index, datastore: Datastore, k: int = 10) -> Iterator[Finding]:
    """Whether searches on two devices (CPU and GPU) find the same entries."""
    queries = noisy_keys(datastore.keys[: datastore.filled], QUERIES) if datastore.keys is not None else None
    if queries is None or not len(queries):
        yield Finding(UNKNOWN, f"{first.device} and {second.device} are not compared, as no keys could be used")
        return
    k = min(k, datastore.filled)
    here, there = (index.search(queries.to(index.device), k)[1].cpu().numpy() for index in (first, second))
    same = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(here, there, strict=True)])
    level = OK if same > 0.95 else WRONG
    yield Finding(level, f"{first.device} and {second.device} agree on {100 * same:.0f}% of the nearest {k}")


def check_clusters(clusters: Clusters, size: int) -> Iterator[Finding]:
    """Whether some of the first `size` entries (those that are not empty) are in no cluster or in several, and whether
    a cluster is too large to be useful. BadFile for numbers of clusters or entries that are out of range."""
    clusters.check()
    listed = np.bincount(np.asarray(clusters.members), minlength=size)[:size]
    missing, double = int((listed == 0).sum()), int((listed > 1).sum())
    if missing:
        text = f"{missing} of {size} entries are in no cluster; pointers take them for members of cluster 0"
        yield Finding(SUSPICIOUS, text)
    if double:
        yield Finding(SUSPICIOUS, f"{double} entries are in several clusters; pointers follow the last")
    sizes = np.diff(clusters.indptr)
    if clusters.count > 1 and sizes.max(initial=0) > size // 2:
        yield Finding(SUSPICIOUS, f"one of {clusters.count} clusters holds {sizes.max()} of {size} entries")
    if not missing and not double:
        mean = size / max(1, clusters.count)
        yield Finding(OK, f"every entry is in one of {clusters.count} clusters, {mean:.1f} in each on average")


def check_overlap(values: NDArray[Any], text: NDArray[Any], what: str) -> Iterator[Finding]:
    """Whether stretches of `text`, which is evaluated, also occur in the datastore: its perplexity is then
    meaningless."""
    if len(text) < STRETCH or len(values) < STRETCH:
        yield Finding(UNKNOWN, f"{what} is too short to be looked for in the datastore")
        return
    starts = sampled_rows(len(text) - STRETCH + 1, 2000)
    sampled = np.unique(_hashes(text)[starts])
    seen = np.zeros(len(sampled), bool)
    for start in range(0, len(values) - STRETCH + 1, CHUNK):
        seen |= np.isin(sampled, _hashes(values[start : start + CHUNK + STRETCH - 1]))
    share = seen.mean()
    if share > 0.05:
        text_inside = f"{100 * share:.0f}% of sampled stretches of {STRETCH} tokens of {what} are in the datastore"
        yield Finding(SUSPICIOUS, text_inside + ": it holds the text that is evaluated")
    else:
        stretches = f"{100 * share:.1f}% of its stretches of {STRETCH} tokens are"
        yield Finding(OK, f"{what} is not in the datastore ({stretches})")


def _hashes(tokens: NDArray[Any]) -> NDArray[np.uint64]:
    """(n - STRETCH + 1,): a hash of every stretch of tokens."""
    count = len(tokens) - STRETCH + 1
    numbers = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    result = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(STRETCH):
            result = result * PRIME + numbers[offset : offset + count]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Every byte


def artefact_files(path: str) -> Iterator[tuple[str, Any]]:
    """(file, its digests) of an artefact: a datastore's prefix, an index, members, a folder of clusters, a binarised
    split, or one of its files. MissingFile or BadFile when there is no sidecar that describes it."""
    described, info = read_any_sidecar(path)
    content = info.get("content")
    if not isinstance(content, dict):
        raise BadFile(described + ".json", "no digests", "a sidecar that has some", "write the artefact again")
    for name, digests in content.items():
        yield _file_of(described, info.get("kind"), name), digests


def _file_of(artefact: str, kind: Any, name: str) -> str:
    name = os.path.basename(name)  # a sidecar must not name files in other folders
    if kind == "datastore":
        return artefact + {"keys": "_keys.npy", "values": "_vals.npy"}.get(name, f"_{name}.npy")
    if kind == "text":
        return artefact + {"data": ".bin", "index": ".idx"}.get(name, "")
    if kind in FOLDER_KINDS:
        return os.path.join(os.path.dirname(artefact), name + ".npy")
    return artefact


def verify_artefact(path: str) -> Iterator[Finding]:
    """Reads every byte and compares it with the sidecar's digests."""
    try:
        files = list(artefact_files(path))
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    for file, digests in files:
        problem = verify(file, digests)
        yield Finding(OK, f"{file}: every byte is as it was written") if problem is None else Finding(WRONG, problem)
