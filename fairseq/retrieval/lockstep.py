"""Many sequences advanced together, one step at a time: their tokens as flat arrays in the order of the steps, and the
arrays of results. Sequences do not depend on each other, so each step needs only one batched search and one batched
computation of distances."""

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
    """The result of retrieval for one ScoredSequence; all arrays are (T,).

    log_probs: log of the mixture, nats; searched: whether the index was searched; candidates: number of entries that
    voted; matched: number of these with the right value; lmbda: the weight of p_kNN; by_temperature: (T, S) log p_kNN,
    nats, at each of the KNNLM's S temperatures, the first of which is used in the mixture."""

    sample_id: int
    log_probs: Tensor
    searched: NDArray[np.bool_]
    candidates: NDArray[np.int64]
    matched: NDArray[np.int64]
    lmbda: Tensor
    by_temperature: Tensor

    @property
    def knn_log_probs(self) -> Tensor:
        """(T,) log p_kNN at the temperature used in the mixture, nats."""
        return self.by_temperature[:, 0]


class Lockstep:
    """The tokens of several sequences as flat arrays, and the arrays of results.

    steps: slices of the flat arrays, each with the tokens that are processed together. For sequential strategies (chunk
    None), step t has token t of every sequence with more than t tokens, in descending order of the sequences' lengths.
    The sequences of a step are therefore a prefix of those of the step before. When tokens do not depend on each other,
    a step has the next `chunk` tokens.

    lmbda: the weight of retrieval for tokens to which the strategy gives none. needs: names of the features that the
    strategy reads."""

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
            rank = np.argsort(np.argsort(-self.lengths, kind="stable"))  # 0 for the longest sequence
            bounds = np.concatenate([[0], np.bincount(positions).cumsum()])
            place = bounds[positions] + np.repeat(rank, self.lengths)
        else:
            bounds, place = np.array([*range(0, count, chunk), count]), np.arange(count)
        self.steps = [slice(first, last) for first, last in itertools.pairwise(bounds.tolist())]
        self._place = torch.from_numpy(place)  # (N,) position in the flat arrays, for tokens in order of sequences
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
        """What a strategy is given about these tokens."""
        features = {name: values[tokens] for name, values in self.features.items()}
        return Step(self.sample_ids[tokens], self.positions[tokens], self.queries[tokens], features)

    def store(self, tokens: slice, knn: Tensor, proposal: Proposal, candidates: Tensor, matched: Tensor) -> None:
        """Stores the results of a step."""
        self.knn_log_probs[tokens], self.searched[tokens] = knn, proposal.search
        self.candidates[tokens], self.matched[tokens] = candidates, matched
        if proposal.lmbda is not None:
            self.lmbda[tokens] = proposal.lmbda.float()

    def results(self, log_probs: Tensor) -> list[RetrievalResult]:
        """One result per sequence, from the mixture of all tokens (N,), nats; UserError when one of them is NaN."""
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
        """`values` (N, ...), which are in order of sequences, split into one part per sequence."""
        return values.split(self.lengths.tolist())


def _feature(sequences: list[ScoredSequence], name: str) -> list[Tensor]:
    """The feature `name` of each sequence, (T, ...); UserError when the sequences were scored without it."""
    if not all(name in sequence.features for sequence in sequences):
        raise UserError(
            f"--strategy: found scores without {name}, which this strategy needs; "
            "save them with eval_lm.py --save-scores DIR --save-features"
        )
    return [sequence.features[name] for sequence in sequences]
