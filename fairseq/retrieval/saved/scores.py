"""Scored sequences on disk: the results of one pass of the language model, so that any number of retrieval settings can
be evaluated without the model (`eval_lm.py --save-scores`, then `fairseq-sweep`).

A folder of plain `.npy` arrays, which are memory-mapped. One row per token, in the order of evaluation: `targets` (N,)
int32, `lm_log_probs` (N,) float32 nats, `queries` (N, D) float32 (float16 when the model ran in half precision),
`word_ends` (N,) bool, whether a word is counted at the token (`--remove-bpe`); with `--save-features` also `lm_max` and
`lm_entropy` (N,) float32 and `context` (N, 4) int32. One row per sample: `lengths` and `sample_ids` (S,) int64.
`scores.json`, the sidecar, is written last and describes the model and the data. Folders named `searches-*` have the
search results of an index (see `saved.searches`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairseq.errors import BadFile, UserError
from fairseq.files.array_stream import ArrayStream, open_array
from fairseq.files.atomic_io import discard, temporary_path
from fairseq.files.checksums import check_opened
from fairseq.files.number_checks import require_numbers, require_range
from fairseq.files.output_lock import exclusive
from fairseq.files.outputs import check_files, score_files
from fairseq.files.sidecar import read_sidecar, remove_sidecar, write_sidecar
from fairseq.scored_sequences import CONTEXT_TOKENS, ScoredSequence

KIND = "scores"
DTYPES: dict[str, tuple[str, ...]] = {
    "targets": ("<i4",),
    "lm_log_probs": ("<f4",),
    "queries": ("<f4", "<f2"),
    "word_ends": ("|b1",),
}
FEATURE_DTYPES: dict[str, tuple[str, ...]] = {"lm_max": ("<f4",), "lm_entropy": ("<f4",), "context": ("<i4",)}
PER_SAMPLE = ("sample_ids", "lengths")
NAMES = (*DTYPES, *FEATURE_DTYPES, *PER_SAMPLE)
LARGEST_LOG_PROB = 1e-3  # nats; above 0 only by rounding
REMEDY = "save the scores again"


class ScoreWriter:
    """Writes a folder sequence by sequence. Files are renamed to their final names in `finish`. Earlier scores in the
    folder become invalid at the first `add`, because their sidecar is removed. The folder is locked until `close`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise BadFile(folder, "a file", "a folder, or a name that is not taken", "choose another --save-scores")
        check_files("--save-scores", score_files(folder, NAMES))
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(exclusive(os.path.join(folder, KIND)))
        self._streams: dict[str, ArrayStream] = {}

    def _open(self, sequence: ScoredSequence) -> None:
        remove_sidecar(os.path.join(self.folder, KIND))
        half = sequence.queries.dtype in (torch.float16, torch.bfloat16)
        dtypes = {name: kinds[0] for name, kinds in DTYPES.items()}
        dtypes["queries"] = "<f2" if half else "<f4"
        for name, dtype in dtypes.items():
            shape = tuple(sequence.queries.shape[1:]) if name == "queries" else ()
            self._streams[name] = ArrayStream(_path(self.folder, name), dtype, shape)
        for name, feature in sequence.features.items():
            shape = tuple(feature.shape[1:])
            self._streams[name] = ArrayStream(_path(self.folder, name), FEATURE_DTYPES[name][0], shape)
        for name in PER_SAMPLE:
            self._streams[name] = ArrayStream(_path(self.folder, name), "<i8")

    def add(self, sequence: ScoredSequence, word_ends: NDArray[np.bool_]) -> None:
        """Appends a sequence; word_ends (T,): whether a word is counted at each token."""
        if not self._streams:
            self._open(sequence)
        arrays = {
            "targets": sequence.targets.numpy(),
            "lm_log_probs": sequence.lm_log_probs.numpy(),
            "queries": sequence.queries.to(_storable(sequence.queries.dtype)).numpy(),
            "word_ends": word_ends,
            "sample_ids": np.array([sequence.sample_id]),
            "lengths": np.array([len(sequence)]),
            **{name: feature.numpy() for name, feature in sequence.features.items()},
        }
        for name, rows in arrays.items():
            self._streams[name].append(rows)

    def finish(self, info: dict[str, Any]) -> None:
        """Renames the files and writes the sidecar, with the fields `info`. UserError when nothing was added."""
        if not self._streams:
            raise UserError(f"{self.folder}: found no sequences to save; check the split")
        counts = {
            "tokens": self._streams["targets"].rows,
            "samples": self._streams["lengths"].rows,
            "dimension": self._streams["queries"].row_shape[0],
            "features": [name for name in FEATURE_DTYPES if name in self._streams],
        }
        content = {name: stream.finish() for name, stream in self._streams.items()}
        write_sidecar(os.path.join(self.folder, KIND), KIND, {**info, **counts, "content": content})
        self.close()

    def close(self) -> None:
        """Releases the lock; removes the temporary files if `finish` was not called."""
        unfinished = [stream.path for stream in self._streams.values() if not stream.finished]
        for stream in self._streams.values():
            stream.close()
        discard([temporary_path(path) for path in unfinished])
        self._lock.close()


def _storable(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float16 else torch.float32


def _path(folder: str, name: str) -> str:
    return os.path.join(folder, name + ".npy")


@dataclass
class ScoreCache:
    """An open folder of scores; the arrays are read-only memory maps (see the module's docstring). info: the fields of
    the sidecar; features: those of `scored_sequences.FEATURES` that were saved."""

    folder: str
    info: dict[str, Any]
    targets: NDArray[np.int32]
    lm_log_probs: NDArray[np.float32]
    queries: NDArray[Any]
    word_ends: NDArray[np.bool_]
    sample_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    features: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str) -> ScoreCache:
        """Memory-maps a folder that `ScoreWriter` wrote; BadFile when it is unfinished or its parts are
        inconsistent."""
        described = os.path.join(folder, KIND)
        info = read_sidecar(described, KIND, {"tokens": int, "samples": int, "dimension": int, "features": list})
        if info is None:
            raise BadFile(folder, "no scores.json", "a folder that eval_lm.py --save-scores wrote to its end", REMEDY)
        tokens, samples = info["tokens"], info["samples"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(DTYPES, (tokens,)) | dict.fromkeys(PER_SAMPLE, (samples,))
        shapes["queries"] = (tokens, info["dimension"])
        kept = [name for name in FEATURE_DTYPES if name in info["features"]]
        shapes |= {name: (tokens, CONTEXT_TOKENS) if name == "context" else (tokens,) for name in kept}
        dtypes = DTYPES | dict.fromkeys(PER_SAMPLE, ("<i8",)) | FEATURE_DTYPES
        check_opened(described, {name: _path(folder, name) for name in shapes}, expected=True, remedy=REMEDY)
        arrays = {name: open_array(_path(folder, name), dtypes[name], shape) for name, shape in shapes.items()}
        features = {name: arrays.pop(name) for name in kept}
        cache = cls(folder, info, **arrays, features=features)
        cache._check()
        return cache

    def _check(self) -> None:
        """BadFile for samples that do not fit the tokens, and for numbers out of range. Queries, which are large, are
        checked when they are read."""
        if self.lengths.min(initial=0) < 0 or self.lengths.max(initial=0) > len(self):
            raise BadFile(self._file("lengths"), "samples that are too long", f"{len(self)} tokens in all", REMEDY)
        if int(self.lengths.sum()) != len(self):
            found = f"samples of {int(self.lengths.sum())} tokens together"
            raise BadFile(self._file("lengths"), found, f"{len(self)}", REMEDY)
        if self.sample_ids.min(initial=0) < 0 or len(np.unique(self.sample_ids)) != len(self.sample_ids):
            raise BadFile(self._file("sample_ids"), "a sample twice, or a negative one", "each once", REMEDY)
        vocabulary = self.info.get("vocabulary")
        below = vocabulary if type(vocabulary) is int else 1 << 31
        require_range(self._file("targets"), self.targets, 0, below, "words", REMEDY)
        require_range(self._file("word_ends"), self.word_ends.view(np.uint8), 0, 2, "truth values", REMEDY)
        require_numbers(self._file("lm_log_probs"), self.lm_log_probs, LARGEST_LOG_PROB, "log-probability", REMEDY)
        for name in ("lm_max", "lm_entropy"):
            if name in self.features:
                require_numbers(self._file(name), self.features[name], np.inf, "number", REMEDY)
        if not self.words:
            raise BadFile(self._file("word_ends"), "no word that counts", "at least one", REMEDY)

    def _file(self, name: str) -> str:
        return _path(self.folder, name)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def dimension(self) -> int:
        """Width D of the queries."""
        return int(self.queries.shape[1])

    @property
    def vocabulary(self) -> int | None:
        """Number of words of the model's dictionary; None when the sidecar does not have it."""
        vocabulary = self.info.get("vocabulary")
        return vocabulary if isinstance(vocabulary, int) else None

    @property
    def starts(self) -> NDArray[np.int64]:
        """(S,): row of each sample's first token."""
        starts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return starts

    @property
    def words(self) -> int:
        """Number of counted words, over which perplexity is an average."""
        return int(self.word_ends.sum())

    def sequences(self) -> Iterator[ScoredSequence]:
        """The scored sequences in order, read one by one."""
        for sample_id, start, length in zip(self.sample_ids.tolist(), self.starts.tolist(), self.lengths.tolist()):
            span = slice(start, start + length)
            if not np.isfinite(self.queries[span]).all():
                found = f"a query of sample {sample_id} that is not finite"
                raise BadFile(self._file("queries"), found, "finite numbers", REMEDY)
            yield ScoredSequence(
                sample_id,
                torch.from_numpy(np.array(self.queries[span])),
                torch.from_numpy(self.targets[span].astype(np.int64)),
                torch.from_numpy(np.array(self.lm_log_probs[span])),
                {name: torch.from_numpy(_widened(array[span])) for name, array in self.features.items()},
            )


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    """A copy in memory, token ids as int64."""
    return array.astype(np.int64 if array.dtype.kind == "i" else array.dtype)
