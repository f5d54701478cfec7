"""Many retrieval settings from one pass of the language model. Scored sequences and search results are read from disk
(`retrieval/score_cache`, `retrieval/search_cache`), so what is left of an evaluation is the walk over the tokens:
pointers, distances, votes. A walk computes p_kNN at all temperatures at once, and another lambda is only another
mixture of its results, so of the settings only strategy, `--min-knns`, `--k` and `--members` cost a walk each.

Each finished walk is kept as a file of per-token arrays: a sweep that was killed, or asked again with more values,
goes on from them. What a walk depends on (scores, index, datastore, clusters, flags) is in its file's name."""

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
from fairseq.files.array_files import read_sealed, same_identity, write_sealed
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.knnlm import Stores, build_knnlm, mix
from fairseq.retrieval.flag_conflicts import strategy_name
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.retrieval.saved.searches import SearchCache
from fairseq.scored_sequences import lockstep_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Walk:
    """One way through the tokens. `settings` describes it in a results file (strategy, members, min_knns, k, ...);
    `args` are eval_lm's flags that amount to it."""

    settings: dict[str, Any]
    args: argparse.Namespace


@dataclass
class Walked:
    """What a walk found, per token: by_temperature (S, N) float32 log p_kNN; searched (N,) bool; weights (N,) float32,
    the lambda that the strategy chose itself, NaN where the constant one holds; and figures of the whole walk."""

    temperatures: list[float]
    by_temperature: NDArray[np.float32]
    searched: NDArray[np.bool_]
    weights: NDArray[np.float32]
    mean_candidates: float
    cpu_seconds: float

    def save(self, path: str, identity: dict[str, Any]) -> None:
        """Writes everything as plain arrays, and whose they are."""
        write_sealed(path, identity, {**vars(self), "temperatures": np.array(self.temperatures)})

    @classmethod
    def load(cls, path: str, identity: dict[str, Any], tokens: int) -> Walked | None:
        """Reads what `save` wrote, to the bit. None, with a warning, when it cannot be read, so that the walk is done
        again; BadFile when it is a walk of something else."""
        try:
            known, arrays = read_sealed(path)
        except BadFile as error:
            logger.warning("%s; walking again", error)
            return None
        if not same_identity(known, identity):
            found, expected = "a walk of other scores or settings", "the one that its name says"
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
            logger.warning("%s: found arrays of another form than those of %d tokens; walking again", path, tokens)
            return None
        if np.isnan(arrays["by_temperature"]).any():
            logger.warning("%s: found log-probabilities that are no numbers; walking again", path)
            return None
        figures = {name: float(arrays.pop(name)) for name in ("mean_candidates", "cpu_seconds")}
        return cls(arrays.pop("temperatures").tolist(), **arrays, **figures)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Place:
    """Where a walk is kept, and what it depends on, of which the file's name is a digest."""

    path: str
    identity: dict[str, Any]


class Sweep:
    """Evaluates settings on `scores` with the `searches` of all its tokens. `folder` keeps the walks; `identity` says
    which scores, index and datastore these are."""

    def __init__(
        self, scores: ScoreCache, searches: SearchCache, stores: Stores, folder: str, identity: dict[str, Any]
    ) -> None:
        self.scores, self.searches, self.stores = scores, searches, stores
        self.folder, self.identity = folder, identity
        self.lm_log_probs = torch.from_numpy(np.array(scores.lm_log_probs))

    def points(self, walk: Walk, lmbdas: Sequence[float], temperatures: Sequence[float]) -> Iterator[dict[str, Any]]:
        """The results of a walk for every lambda and temperature."""
        for lmbda in lmbdas:
            walked = self._walked(walk, lmbda, temperatures)
            saved = self._saved_searches(walked.searched)
            for temperature in temperatures:
                knn = torch.from_numpy(walked.by_temperature[walked.temperatures.index(temperature)])
                weights = torch.from_numpy(walked.weights)
                weights = torch.where(weights.isnan(), lmbda, weights)
                yield {
                    **walk.settings,
                    "lmbda": lmbda,
                    "knn_temp": temperature,
                    **self.figures(mix(self.lm_log_probs, knn, weights)),
                    **saved,
                    "mean_candidates": walked.mean_candidates,
                    "walk_cpu_seconds": walked.cpu_seconds,
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

    def _walked(self, walk: Walk, lmbda: float, temperatures: Sequence[float]) -> Walked:
        """The walk's results: from its file, if one has all the temperatures, else by walking. The file is for all
        lambdas when the walk turns out not to depend on it."""
        wanted = list(dict.fromkeys(temperatures))
        places = [self._place(walk, None), self._place(walk, lmbda)]
        for place in places:
            if os.path.exists(place.path):
                known = Walked.load(place.path, place.identity, len(self.scores))
                if known is None:
                    continue
                if set(wanted) <= set(known.temperatures):
                    logger.info("taken from %s, which the same code wrote", place.path)
                    return known
                wanted = list(dict.fromkeys([*known.temperatures, *wanted]))
        walked = self._walk(walk, lmbda, wanted)
        only_mixes = RETRIEVER_REGISTRY[strategy_name(walk.args)].only_mixes
        constant = walked.weights == np.float32(lmbda)
        if only_mixes and lmbda > 0 and (constant | (walked.weights == 0)).all():
            walked.weights[constant] = np.nan
            walked.save(places[0].path, places[0].identity)
        else:
            walked.save(places[1].path, places[1].identity)
        return walked

    def _place(self, walk: Walk, lmbda: float | None) -> _Place:
        files = {
            name: quick_fingerprint(value)
            for name, value in sorted(vars(walk.args).items())
            if isinstance(value, str) and name in walk.settings | {"members": None} and os.path.exists(value)
        }
        settings = {name: value for name, value in walk.settings.items() if name != "series"}
        code = strategy_code(RETRIEVER_REGISTRY[strategy_name(walk.args)])
        key = {"walk": settings, "lmbda": lmbda, "files": files, "of": self.identity, "code": code}
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        return _Place(os.path.join(self.folder, f"{digest}.npz"), key)

    def _walk(self, walk: Walk, lmbda: float, temperatures: list[float]) -> Walked:
        args = argparse.Namespace(**{**vars(walk.args), "lmbda": lmbda, "knn_temp": temperatures[0]})
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
        return Walked(temperatures, by_temperature, searched, weights, candidates / max(1, tokens), seconds)
