"""The features `freq` and `fert` of AdaptRet (He et al., 2021, section 3.2), for contexts of 1 to 4 tokens: how often a
context occurs in the training text, and by how many different words it is followed.

A context is stored as a 64-bit hash. To count, the hashes of one order are sorted and the lengths of their runs
measured, part by part so that memory is limited. On disk: a folder with, for each order n, the ascending hashes
`hashes-n.npy` (U,) uint64 and their `freq-n.npy` and `fert-n.npy` (U,) uint32; `ngrams.json`, the sidecar, is written
last. Look-up is by binary search in the memory-mapped files. Two contexts with the same hash would share their counts;
with 100 million contexts, fewer than one in a thousand such tables has such a pair."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq.errors import BadFile
from fairseq.files.array_stream import ArrayStream, open_array
from fairseq.files.checksums import check_opened
from fairseq.files.output_lock import exclusive
from fairseq.files.sidecar import read_sidecar, remove_sidecar, write_sidecar

logger = logging.getLogger(__name__)

KIND = "ngrams"
ORDERS = 4
ARRAYS = {"hashes": "<u8", "freq": "<u4", "fert": "<u4"}
NOT_OF_THE_TEXT = ("kind", "format_version", "contexts", "content")  # fields of the sidecar
REMEDY = "delete the folder and count again with fairseq-adaptret"
CHUNK = 1 << 20  # tokens hashed at a time
BYTES_PER_CONTEXT = 48  # of one part: hash, following token, sorting order and their sorted copies

_FACTOR, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x9E3779B97F4A7C15)


def hash_contexts(contexts: NDArray[Any]) -> NDArray[np.uint64]:
    """(T, n) uint64: column i hashes the first i + 1 columns of `contexts` (T, n), nearest token first."""
    state = np.zeros(len(contexts), np.uint64)
    hashes = np.empty(contexts.shape, np.uint64)
    with np.errstate(over="ignore"):
        for order in range(contexts.shape[1]):
            state = (state ^ contexts[:, order].astype(np.uint64)) * _FACTOR + _STEP
            state ^= state >> np.uint64(29)
            hashes[:, order] = state * _FACTOR
    return hashes


def contexts_of(tokens: NDArray[Any], start: int, end: int, eos: int, by_sentence: bool) -> NDArray[np.int64]:
    """(end - start, 4): the four tokens before each of `tokens[start:end]`, the nearest first. Positions before the
    start of the text have `eos`; with `by_sentence` also positions before the start of the token's sentence."""
    contexts = np.full((end - start, ORDERS), eos, np.int64)
    inside = np.ones(end - start, bool)
    for order in range(1, ORDERS + 1):
        first = max(start, order)
        if first >= end:
            break
        before = tokens[first - order : end - order]
        column = contexts[first - start :, order - 1]
        column[:] = np.where(inside[first - start :], before, eos) if by_sentence else before
        if by_sentence:
            inside &= contexts[:, order - 1] != eos
    return contexts


@dataclass
class NgramTable:
    """Counts, memory-mapped from a folder. Each list has one array per order: ascending hashes, and their freq and
    fert."""

    hashes: list[NDArray[np.uint64]]
    freq: list[NDArray[np.uint32]]
    fert: list[NDArray[np.uint32]]
    by_sentence: bool
    identity: dict[str, Any] = field(default_factory=dict)  # the text that was counted, and the counts, by digests

    def look_up(self, contexts: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(log(1 + freq), log(1 + fert)), each (T, 4) for orders 1 to 4, of contexts (T, 4), nearest token first.
        A context that the training text lacks counts 0."""
        hashes = hash_contexts(contexts)
        freq, fert = np.zeros(hashes.shape, np.float32), np.zeros(hashes.shape, np.float32)
        for order, counted in enumerate(self.hashes):
            if not len(counted):
                continue
            place = np.minimum(np.searchsorted(counted, hashes[:, order]), len(counted) - 1)
            found = counted[place] == hashes[:, order]
            for counts, result in ((self.freq[order], freq), (self.fert[order], fert)):
                result[:, order] = np.where(found, np.log1p(counts[place], dtype=np.float32), 0)
        return freq, fert

    @classmethod
    def open(cls, folder: str) -> NgramTable:
        """Memory-maps a folder that `count_ngrams` wrote; BadFile when it is unfinished or inconsistent."""
        described = os.path.join(folder, KIND)
        info = read_sidecar(described, KIND, {"contexts": list, "tokens": int, "eos": int})
        counts = [] if info is None else info["contexts"]
        if info is None or len(counts) != ORDERS or not all(type(count) is int and count >= 0 for count in counts):
            raise BadFile(folder, "no whole ngrams.json", "a folder that fairseq-adaptret wrote", REMEDY)
        paths = {(name, order): _path(folder, name, order) for name in ARRAYS for order in range(1, ORDERS + 1)}
        files = {os.path.basename(path).removesuffix(".npy"): path for path in paths.values()}
        check_opened(described, files, expected=True, remedy=REMEDY)
        arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
        for (name, order), path in paths.items():
            arrays[name].append(open_array(path, (ARRAYS[name],), (counts[order - 1],)))
        identity = {name: value for name, value in info.items() if name not in NOT_OF_THE_TEXT}
        if "content" in info:
            counts_digest = hashlib.blake2b(json.dumps(info["content"], sort_keys=True).encode(), digest_size=16)
            identity["counts"] = counts_digest.hexdigest()
        return cls(arrays["hashes"], arrays["freq"], arrays["fert"], bool(info.get("by_sentence")), identity)


def _path(folder: str, name: str, order: int) -> str:
    return os.path.join(folder, f"{name}-{order}.npy")


def count_ngrams(
    tokens: NDArray[Any],
    folder: str,
    eos: int,
    by_sentence: bool = False,
    memory: int = 2 << 30,
    info: dict[str, Any] | None = None,
    show_progress: bool = True,
) -> NgramTable:
    """Counts the contexts of `tokens` (N,), the training text in order, into `folder`; at most about `memory` bytes.

    info: plain values that identify the text. A complete folder for the same text is used again."""
    identity = {**(info or {}), "tokens": len(tokens), "eos": eos, "by_sentence": by_sentence}
    with exclusive(os.path.join(folder, KIND)):
        return _counted(tokens, folder, identity, memory, show_progress)


def _counted(
    tokens: NDArray[Any], folder: str, identity: dict[str, Any], memory: int, show_progress: bool
) -> NgramTable:
    stored = read_sidecar(os.path.join(folder, KIND), KIND, {"contexts": list})
    if stored is not None and {**stored, **json.loads(json.dumps(identity))} == stored:
        return NgramTable.open(folder)
    remove_sidecar(os.path.join(folder, KIND))  # it would not describe the new counts
    parts = 1
    while len(tokens) * BYTES_PER_CONTEXT > memory * parts:
        parts *= 2
    logger.info("counting the contexts of %d tokens, in %d parts", len(tokens), parts)
    contexts, content = [], dict[str, Any]()
    with tqdm(total=ORDERS * parts, unit="parts", disable=None if show_progress else True) as progress:
        for order in range(1, ORDERS + 1):
            streams = {name: ArrayStream(_path(folder, name, order), dtype) for name, dtype in ARRAYS.items()}
            for part in range(parts):
                counts = _count_part(tokens, order, identity["eos"], identity["by_sentence"], part, parts)
                for name, rows in zip(ARRAYS, counts, strict=True):
                    streams[name].append(rows)
                progress.update()
            contexts.append(streams["hashes"].rows)
            content |= {f"{name}-{order}": stream.finish() for name, stream in streams.items()}
    write_sidecar(os.path.join(folder, KIND), KIND, {**identity, "contexts": contexts, "content": content})
    return NgramTable.open(folder)


def _count_part(
    tokens: NDArray[Any], order: int, eos: int, by_sentence: bool, part: int, parts: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """(hashes, freq, fert) of the contexts whose hash lies in the `part`-th of `parts` equal ranges."""
    bits = np.uint64(64 - (parts.bit_length() - 1))
    hashes, following = [], []
    for start in range(0, len(tokens), CHUNK):
        end = min(start + CHUNK, len(tokens))
        hashed = hash_contexts(contexts_of(tokens, start, end, eos, by_sentence)[:, :order])[:, -1]
        here = hashed >> bits == part if parts > 1 else slice(None)
        hashes.append(hashed[here])
        following.append(np.asarray(tokens[start:end], np.int32)[here])
    context, token = np.concatenate(hashes or [np.zeros(0, np.uint64)]), np.concatenate(following or [np.zeros(0, int)])
    sorting = np.lexsort((token, context))
    context, token = context[sorting], token[sorting]
    begins = np.flatnonzero(np.diff(context, prepend=~context[:1]))  # the first occurrence differs from what is before
    fresh = np.ones(len(context), np.int64)  # 1 where the pair of context and token occurs for the first time
    fresh[1:] = (context[1:] != context[:-1]) | (token[1:] != token[:-1])
    freq = np.diff(np.append(begins, len(context)))
    fert = np.add.reduceat(fresh, begins) if len(begins) else fresh
    return context[begins], freq, fert
