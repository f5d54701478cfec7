"""Many sequences, one step at a time: their tokens as flat arrays, in the order of the steps, and the arrays that
results go into. Sequences do not depend on each other, so one batched search and one batched distance computation serve
a step."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import UserError
from fairseq.retrieval.retrievers import Proposal, Step
from fairseq.scored_sequences import ScoredSequence


@dataclass
class RetrievalResult:
    """What retrieval made of one ScoredSequence; all arrays are (T,).

    log_probs: log of the mixture, nats; searched: whether the index was searched; candidates: how many entries voted;
    matched: how many of them had the right value; lmbda: the weight of p_kNN; by_temperature: (T, S) log p_kNN, nats,
    at each of the KNNLM's S temperatures, the first of which is the one that was mixed."""

    sample_id: int
    log_probs: Tensor
    searched: NDArray[np.bool_]
    candidates: NDArray[np.int64]
    matched: NDArray[np.int64]
    lmbda: Tensor
    by_temperature: Tensor

    @property
    def knn_log_probs(self) -> Tensor:
        """(T,) log p_kNN at the temperature that was mixed, nats."""
        return self.by_temperature[:, 0]


class Lockstep:
    """The tokens of several sequences as flat arrays, and the arrays that results go into.

    steps: which tokens advance together, those of a step one after the other. Of sequential strategies (chunk None),
    step t has token t of every sequence that is so long, the longest sequence first, so that those still running are a
    prefix of those before; when tokens do not depend on each other, a step has the next `chunk` tokens.

    lmbda: the weight of retrieval where a strategy gives none."""

    def __init__(
        self,
        sequences: list[ScoredSequence],
        device: torch.device,
        temperatures: int,
        lmbda: float,
        needs: Collection[str] = (),
        chunk: int | None = None,
    ) -> None:
        self.sequences = sequences
        self.lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        count = int(self.lengths.sum())
        starts = np.cumsum(self.lengths) - self.lengths
        positions = np.arange(count) - np.repeat(starts, self.lengths)
        if chunk is None:
            rank = np.argsort(np.argsort(-self.lengths, kind="stable"))  # the longest is the first
            bounds = np.concatenate([[0], np.bincount(positions).cumsum()])
            place = bounds[positions] + np.repeat(rank, self.lengths)
        else:
            bounds, place = np.array([*range(0, count, chunk), count]), np.arange(count)
        self.steps = [slice(first, last) for first, last in itertools.pairwise(bounds.tolist())]
        self._place = torch.from_numpy(place)  # (N,) of the tokens of one sequence after the other
        places_of = self._of_each(self._place)

        def of_all(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
            joined = torch.empty(count, *parts[0].shape[1:], dtype=dtype or parts[0].dtype)
            for part, places in zip(parts, places_of, strict=True):
                joined[places] = part.to(joined)
            return joined.to(device)

        self.queries = of_all([sequence.queries for sequence in sequences], torch.float32)
        self.targets = of_all([sequence.targets for sequence in sequences])
        self.lm_log_probs = of_all([sequence.lm_log_probs for sequence in sequences], torch.float32)
        self.features = {name: of_all(_feature(sequences, name)) for name in sorted(needs)}
        self.sample_ids = of_all([torch.full((len(sequence),), sequence.sample_id) for sequence in sequences])
        self.positions = of_all(self._of_each(torch.from_numpy(positions)))
        self.knn_log_probs = torch.zeros(count, temperatures, device=device)
        self.lmbda = torch.full((count,), lmbda, dtype=torch.float32, device=device)
        self.searched = torch.zeros(count, dtype=torch.bool, device=device)
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.matched = torch.zeros(count, dtype=torch.int64, device=device)

    def step(self, tokens: slice) -> Step:
        """What a strategy may see of these tokens."""
        features = {name: values[tokens] for name, values in self.features.items()}
        return Step(self.sample_ids[tokens], self.positions[tokens], self.queries[tokens], features)

    def store(self, tokens: slice, knn: Tensor, proposal: Proposal, candidates: Tensor, matched: Tensor) -> None:
        """Keeps the results of a step."""
        self.knn_log_probs[tokens], self.searched[tokens] = knn, proposal.search
        self.candidates[tokens], self.matched[tokens] = candidates, matched
        if proposal.lmbda is not None:
            self.lmbda[tokens] = proposal.lmbda.float()

    def results(self, log_probs: Tensor) -> list[RetrievalResult]:
        """One result per sequence, from the mixture of all tokens (N,), nats; UserError when one is not a number."""
        if torch.isnan(log_probs).any():
            raise UserError("the retrieval produced a value that is not a number; check the datastore and index with k")
        of_step_order = log_probs, self.searched, self.candidates, self.matched, self.lmbda, self.knn_log_probs
        by_sequence = (self._of_each(values.cpu()[self._place]) for values in of_step_order)
        return [
            RetrievalResult(
                sequence.sample_id, mixed, searched.numpy(), candidates.numpy(), matched.numpy(), lmbda, by_temperature
            )
            for sequence, mixed, searched, candidates, matched, lmbda, by_temperature in zip(
                self.sequences, *by_sequence, strict=True
            )
        ]

    def _of_each(self, values: Tensor) -> tuple[Tensor, ...]:
        """Each sequence's part of what is there for one sequence after the other."""
        return values.split(self.lengths.tolist())


def _feature(sequences: list[ScoredSequence], name: str) -> list[Tensor]:
    """Each sequence's (T, ...) feature; UserError when they were scored without it."""
    if not all(name in sequence.features for sequence in sequences):
        raise UserError(
            f"--strategy: found scores without {name}, which this strategy needs; "
            "save them with eval_lm.py --save-scores DIR --save-features"
        )
    return [sequence.features[name] for sequence in sequences]
