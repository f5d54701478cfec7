"""Saved search results: the `k` nearest entries of every token. With them, any `--min-knns`, `--lmbda`, `--knn-temp`,
`--members`, strategy or smaller `--k` can be evaluated without a search. The result for a smaller k is the beginning of
that for a larger one (except that of entries with equal distances at the cut, others may be included).

On disk, beside the scores: `searches-XXXXXXXX/ids.npy` (N, k) int32 or int64, `distances.npy` (N, k) float32, and the
sidecar `searches.json`, which is written last. Its `identity` identifies the index and the search flags, and XXXXXXXX
is a digest of it. The folder is written resumably."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fairseq.errors import BadFile, BadFlag
from fairseq.files.array_stream import ArrayStream, open_array, progress, rows_done
from fairseq.files.atomic_io import require_free_space
from fairseq.files.checksums import check_opened
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.files.number_checks import require_no_nan, require_range
from fairseq.files.output_lock import exclusive
from fairseq.files.progress import write_progress
from fairseq.files.sidecar import read_sidecar, remove_sidecar, write_sidecar
from fairseq.registry import declared_actions, is_built_in
from fairseq.retrieval.clusters.members import index_dtype
from fairseq.retrieval.datastore import keys_path
from fairseq.retrieval.index import Index
from fairseq.retrieval.index.interface import named_index
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.scored_sequences import ScoredSequence
from fairseq.sizes import size_text

logger = logging.getLogger(__name__)

KIND = "searches"
REMEDY = "delete the folder to search again"
CHUNK_NUMBERS = 1 << 22  # results of one search call: 4096 tokens at k = 1024
SAFE_POINT_SECONDS = 30.0


class SearchCache:
    """Search results for all tokens of some samples. ids (N, k), distances (N, k) float32, nearest first; sample_ids
    and lengths (S,): the rows are the tokens of these samples, one sample after the other."""

    def __init__(
        self,
        ids: NDArray[Any],
        distances: NDArray[np.float32],
        sample_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> None:
        self.ids, self.distances = ids, distances
        order = np.argsort(sample_ids)
        self._samples, self._first_row = sample_ids[order], (np.cumsum(lengths) - lengths)[order]

    @property
    def k(self) -> int:
        """Number of saved neighbours per token."""
        return int(self.ids.shape[1])

    def look_up(self, sample_ids: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Index.search`: distances and ids (B, k) of the tokens at `positions` (B,) of samples `sample_ids`
        (B,)."""
        if k > self.k:
            raise BadFlag("--k", k, f"at most the {self.k} neighbours that were saved", "save the searches again")
        wanted = sample_ids.cpu().numpy()
        places = np.minimum(np.searchsorted(self._samples, wanted), len(self._samples) - 1)
        assert (self._samples[places] == wanted).all(), "a sample whose searches are not here"
        rows = self._first_row[places] + positions.cpu().numpy()
        device = positions.device
        distances = torch.from_numpy(self.distances[rows, :k]).to(device)
        return distances, torch.from_numpy(self.ids[rows, :k].astype(np.int64)).to(device)

    @classmethod
    def of(
        cls, sequences: Sequence[ScoredSequence], index: Index, k: int, device: torch.device | str = "cpu"
    ) -> SearchCache:
        """Searches for every token of `sequences`, with queries on `device`; the results are in memory only."""
        queries = torch.cat([sequence.queries for sequence in sequences]).to(device, torch.float32)
        ids: NDArray[Any] = np.empty((len(queries), k), index_dtype(index.size))
        distances = np.empty((len(queries), k), np.float32)
        step = max(1, CHUNK_NUMBERS // k)
        for start in range(0, len(queries), step):
            found, nearest = index.search(queries[start : start + step], k)
            distances[start : start + step], ids[start : start + step] = found.cpu().numpy(), nearest.cpu().numpy()
        sample_ids = np.array([sequence.sample_id for sequence in sequences], np.int64)
        return cls(ids, distances, sample_ids, np.array([len(sequence) for sequence in sequences], np.int64))


def search_identity(args: argparse.Namespace, index: Index) -> dict[str, Any]:
    """The `identity` of searches of the `index` that eval_lm's flags name: its file and the number of lists visited, or
    the keys; and whether results are refined by the keys."""
    if args.index is not None:
        cls = named_index(args.index)
        code = None if is_built_in(cls) else quick_fingerprint(inspect.getfile(cls))
        files = {"keys": keys_path(args.dstore_filename), "file": args.indexfile}
        found = {name: quick_fingerprint(path) for name, path in files.items() if path and os.path.exists(path)}
        of_name = {"index": args.index, "entries": index.size, **found}
        if code is None:
            return of_name
        own = {action.dest: getattr(args, action.dest, None) for action in declared_actions(cls)}
        typed = {"indexfile": args.indexfile, "probe": args.probe, "flags": {name: str(own[name]) for name in own}}
        return {**of_name, "code": code, **typed, "files": _fingerprints([args.indexfile, *own.values()])}
    identity = {"index": quick_fingerprint(args.indexfile), "probe": args.probe, "entries": index.size}
    return identity | ({"refined": True} if index.exact else {})


def _fingerprints(values: Iterable[Any]) -> dict[str, str]:
    """Fingerprints of the files that flags of a user's index name: as a path, or as paths in a list or joined by
    colons."""
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    paths = [path for text in texts if isinstance(text, str) for path in (text, *text.split(os.pathsep))]
    return {path: quick_fingerprint(path) for path in dict.fromkeys(paths) if os.path.isfile(path)}


def saved_searches(
    scores: ScoreCache,
    index: Index,
    k: int,
    identity: dict[str, Any],
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> SearchCache:
    """The search results of all tokens of `scores` for at least `k` neighbours. If they are saved beside the scores
    they are opened, else they are computed (resumably) and saved. identity: plain values that identify the index and
    the search flags."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = os.path.join(scores.folder, f"{KIND}-{digest}")
    described = os.path.join(folder, KIND)
    tokens = {"tokens": len(scores), "scores": scores.info}
    info = read_sidecar(described, KIND, {"k": int})
    if info is not None and info.get("identity") != json.loads(json.dumps(identity)):
        raise BadFile(folder, "searches of another index or with other flags", f"those of {identity}", REMEDY)
    if info is None or info["k"] < k or info.get("of") != tokens:
        with exclusive(os.path.join(folder, KIND)):
            _search_all(scores, index, k, folder, {"identity": identity, "of": tokens}, device, show_progress)
        info = {"k": k}
    shape = (len(scores), int(info["k"]))
    paths = {name: os.path.join(folder, name + ".npy") for name in ("ids", "distances")}
    check_opened(described, paths, expected=True, remedy=REMEDY)
    ids = open_array(paths["ids"], ("<i4", "<i8"), shape)
    distances = open_array(paths["distances"], ("<f4",), shape)
    require_range(paths["ids"], ids, -1, index.size, "ids", REMEDY)
    require_no_nan(paths["distances"], distances, "distance", REMEDY)
    logger.info("searches %s: %d nearest entries of %d tokens", folder, shape[1], shape[0])
    return SearchCache(ids, distances, scores.sample_ids, scores.lengths)


def _search_all(
    scores: ScoreCache,
    index: Index,
    k: int,
    folder: str,
    identity: dict[str, Any],
    device: torch.device | str,
    show_progress: bool,
) -> None:
    """Searches for every token. A progress file records the number of rows after which a later run can continue."""
    dtype = np.dtype(index_dtype(index.size)).newbyteorder("<")
    row_bytes = k * (dtype.itemsize + 4)
    description = {**identity, "k": k}
    progress_path = os.path.join(folder, "progress.json")
    done, digests = rows_done(progress_path, description, 2)
    remove_sidecar(os.path.join(folder, KIND))
    require_free_space(os.path.join(folder, "ids.npy"), (len(scores) - done) * row_bytes, "the saved searches")
    try:
        streams = _streams(folder, dtype, k, done, digests)
    except BadFile as error:  # the files of an earlier run are gone, or have changed
        logger.warning("%s; searching again from the beginning", error)
        done, streams = 0, _streams(folder, dtype, k, 0, digests)
    logger.info("searching for %d tokens, k %d: %s in %s", len(scores), k, size_text(len(scores) * row_bytes), folder)
    step = max(1, CHUNK_NUMBERS // k)
    last_safe_point = time.monotonic()
    bar = tqdm(total=len(scores), initial=done, unit="tokens", unit_scale=True, disable=None if show_progress else True)
    with bar:
        for start in range(done, len(scores), step):
            queries = torch.from_numpy(np.array(scores.queries[start : start + step], np.float32)).to(device)
            distances, ids = index.search(queries, k)
            streams[0].append(ids.cpu().numpy())
            streams[1].append(distances.cpu().numpy())
            bar.update(len(queries))
            if time.monotonic() - last_safe_point > SAFE_POINT_SECONDS:
                for stream in streams:
                    stream.flush()
                write_progress(progress_path, progress(description, streams))
                last_safe_point = time.monotonic()
    content = {name: stream.finish() for name, stream in zip(("ids", "distances"), streams, strict=True)}
    write_sidecar(os.path.join(folder, KIND), KIND, {**description, "content": content})
    if os.path.exists(progress_path):
        os.unlink(progress_path)


def _streams(folder: str, dtype: Any, k: int, rows: int, digests: list[str]) -> list[ArrayStream]:
    ids = ArrayStream(os.path.join(folder, "ids.npy"), dtype, (k,), rows, digests[0])
    try:
        return [ids, ArrayStream(os.path.join(folder, "distances.npy"), "<f4", (k,), rows, digests[1])]
    except BadFile:
        ids.close()
        raise
