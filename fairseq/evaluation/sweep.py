"""Many retrieval settings from one pass of the language model. Scored sequences and search results are read from disk
(`retrieval/saved`), so each setting needs only an evaluation pass of the retrieval step: pointers, distances, votes. A
pass computes p_kNN at all temperatures at once, and another lambda is only another mixture of its results. Therefore a
pass of its own is needed only for each strategy, `--min-knns`, `--k` and `--members`.

The results of each pass are saved as a file of per-token arrays. A sweep that was killed, or that is run again with
more values, reuses these files. Everything that a pass depends on (scores, index, datastore, clusters, flags, code) is
identified by a digest in the file's name."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import BadFile
from fairseq.evaluation.saved_searches import count_saved
from fairseq.evaluation.strategy_code import strategy_code
from fairseq.files.array_files import read_digested, same_identity, write_digested
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.knnlm import Stores, build_knnlm, mix
from fairseq.retrieval.flag_conflicts import strategy_name
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.retrieval.saved.searches import SearchCache
from fairseq.scored_sequences import lockstep_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A setting of a sweep, except for lambda and temperature. settings: its description in a results file (strategy,
    members, min_knns, k, ...); args: eval_lm's flags for it."""

    settings: dict[str, Any]
    args: argparse.Namespace


@dataclass
class SettingResult:
    """The results of one evaluation pass over N tokens: by_temperature (S, N) float32 log p_kNN; searched (N,) bool;
    weights (N,) float32: the lambda that the strategy chose, NaN where the constant lambda is used; the mean number of
    candidates per token; and the pass's processor time."""

    temperatures: list[float]
    by_temperature: NDArray[np.float32]
    searched: NDArray[np.bool_]
    weights: NDArray[np.float32]
    mean_candidates: float
    cpu_seconds: float

    def save(self, path: str, identity: dict[str, Any]) -> None:
        """Writes everything as plain arrays, with the identity of the pass."""
        write_digested(path, identity, {**vars(self), "temperatures": np.array(self.temperatures)})

    @classmethod
    def load(cls, path: str, identity: dict[str, Any], tokens: int) -> SettingResult | None:
        """Reads what `save` wrote, to the bit. None, with a warning, when the file is damaged, so that the pass is
        repeated; BadFile when it is the result of another pass."""
        try:
            stored, arrays = read_digested(path)
        except BadFile as error:
            logger.warning("%s; evaluating again", error)
            return None
        if not same_identity(stored, identity):
            found, expected = "the result for other scores or settings", "the one that its name says"
            raise BadFile(path, found, expected, "delete it, or choose another --output")
        count = len(arrays["temperatures"]) if arrays.get("temperatures", np.zeros(())).ndim == 1 else -1
        layout: dict[str, Any] = {
            "temperatures": ("f8", (count,)),
            "by_temperature": ("f4", (count, tokens)),
            "searched": ("b1", (tokens,)),
            "weights": ("f4", (tokens,)),
            "mean_candidates": ("f8", ()),
            "cpu_seconds": ("f8", ()),
        }
        if {name: (array.dtype.str[1:], array.shape) for name, array in arrays.items()} != layout:
            logger.warning("%s: found arrays of another form than those of %d tokens; evaluating again", path, tokens)
            return None
        if np.isnan(arrays["by_temperature"]).any():
            logger.warning("%s: found log-probabilities that are NaN; evaluating again", path)
            return None
        figures = {name: float(arrays.pop(name)) for name in ("mean_candidates", "cpu_seconds")}
        return cls(arrays.pop("temperatures").tolist(), **arrays, **figures)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _ResultFile:
    """The file of a pass's results, and the identity of the pass, of which the file's name is a digest."""

    path: str
    identity: dict[str, Any]


class Sweep:
    """Evaluates settings on `scores` with the `searches` of all its tokens. folder: where results are saved; identity:
    identifies the scores, the index and the datastore."""

    def __init__(
        self, scores: ScoreCache, searches: SearchCache, stores: Stores, folder: str, identity: dict[str, Any]
    ) -> None:
        self.scores, self.searches, self.stores = scores, searches, stores
        self.folder, self.identity = folder, identity
        self.lm_log_probs = torch.from_numpy(np.array(scores.lm_log_probs))

    def points(
        self, setting: Setting, lmbdas: Sequence[float], temperatures: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        """The fields of a results file for `setting` with every lambda and temperature."""
        for lmbda in lmbdas:
            result = self._result(setting, lmbda, temperatures)
            saved = self._saved_searches(result.searched)
            for temperature in temperatures:
                knn = torch.from_numpy(result.by_temperature[result.temperatures.index(temperature)])
                weights = torch.from_numpy(result.weights)
                weights = torch.where(weights.isnan(), lmbda, weights)
                yield {
                    **setting.settings,
                    "lmbda": lmbda,
                    "knn_temp": temperature,
                    **self.figures(mix(self.lm_log_probs, knn, weights)),
                    **saved,
                    "mean_candidates": result.mean_candidates,
                    "retrieval_cpu_seconds": result.cpu_seconds,
                }

    def figures(self, log_probs: Tensor) -> dict[str, float]:
        """Loss in bits and perplexity per counted word, from (N,) log-probabilities in nats."""
        total, words = float(log_probs.double().sum()), self.scores.words
        loss = -total / words / math.log(2)
        return {"loss_base2": loss, "perplexity": 2**loss if loss < 1000 else math.inf, "count": words}

    def _saved_searches(self, searched: NDArray[np.bool_]) -> dict[str, float | None]:
        saved = count_saved(np.split(searched, self.scores.starts[1:]))
        return {
            "tokens": saved.tokens,
            "searches": saved.searches,
            "searches_saved_percent": 100 * saved.true_share,
            "lookups_saved_percent_printed": 100 * saved.printed_share if saved.searches else None,
        }

    def _result(self, setting: Setting, lmbda: float, temperatures: Sequence[float]) -> SettingResult:
        """The results for `setting`: from a file that has all the temperatures, if there is one, else by an evaluation
        pass. A file without lambda in its name is for all lambdas; it is written when lambda only affects the
        mixture."""
        wanted = list(dict.fromkeys(temperatures))
        files = [self._result_file(setting, None), self._result_file(setting, lmbda)]
        for file in files:
            if os.path.exists(file.path):
                stored = SettingResult.load(file.path, file.identity, len(self.scores))
                if stored is None:
                    continue
                if set(wanted) <= set(stored.temperatures):
                    logger.info("taken from %s, which the same code wrote", file.path)
                    return stored
                wanted = list(dict.fromkeys([*stored.temperatures, *wanted]))
        result = self._evaluate(setting, lmbda, wanted)
        only_mixes = RETRIEVER_REGISTRY[strategy_name(setting.args)].only_mixes
        constant = result.weights == np.float32(lmbda)
        if only_mixes and lmbda > 0 and (constant | (result.weights == 0)).all():
            result.weights[constant] = np.nan
            result.save(files[0].path, files[0].identity)
        else:
            result.save(files[1].path, files[1].identity)
        return result

    def _result_file(self, setting: Setting, lmbda: float | None) -> _ResultFile:
        files = {
            name: quick_fingerprint(value)
            for name, value in sorted(vars(setting.args).items())
            if isinstance(value, str) and name in setting.settings | {"members": None} and os.path.exists(value)
        }
        settings = {name: value for name, value in setting.settings.items() if name != "series"}
        code = strategy_code(RETRIEVER_REGISTRY[strategy_name(setting.args)])
        key = {"settings": settings, "lmbda": lmbda, "files": files, "of": self.identity, "code": code}
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        return _ResultFile(os.path.join(self.folder, f"{digest}.npz"), key)

    def _evaluate(self, setting: Setting, lmbda: float, temperatures: list[float]) -> SettingResult:
        """One evaluation pass over all tokens."""
        args = argparse.Namespace(**{**vars(setting.args), "lmbda": lmbda, "knn_temp": temperatures[0]})
        stores, dimension = self.stores, self.scores.dimension
        knnlm = build_knnlm(args, dimension, stores.device, stores, temperatures[1:], self.searches)
        tokens = len(self.scores)
        by_temperature = np.empty((len(temperatures), tokens), np.float32)
        searched, weights = np.empty(tokens, bool), np.empty(tokens, np.float32)
        candidates = end = 0
        began = time.process_time()
        for group in lockstep_groups(self.scores.sequences(), args.lockstep_tokens):
            for result in knnlm.score(group):
                start, end = end, end + len(result.searched)
                by_temperature[:, start:end] = result.by_temperature.numpy().T
                searched[start:end], weights[start:end] = result.searched, result.lmbda.numpy()
                candidates += int(result.candidates.sum())
        seconds = time.process_time() - began
        return SettingResult(temperatures, by_temperature, searched, weights, candidates / max(1, tokens), seconds)
