"""Many sequences, one step at a time: their tokens as flat arrays, token t of every sequence in step t, and the arrays
that results go into. Sequences do not depend on each other, so one batched search and one batched distance computation
serve a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import UserError
from fairseq.retrieval.retrievers import Step
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
    """The tokens of several sequences as flat arrays, longest sequence first, so that those still running at any step
    are a prefix; and the arrays that results go into."""

    def __init__(
        self, sequences: list[ScoredSequence], device: torch.device, temperatures: int, needs: Collection[str] = ()
    ) -> None:
        self.sequences = sequences
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        self.starts = np.cumsum(lengths) - lengths
        self.order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths
        self.device = device
        self.queries = torch.cat([sequence.queries for sequence in sequences]).to(device, torch.float32)
        self.targets = torch.cat([sequence.targets for sequence in sequences]).to(device)
        self.lm_log_probs = torch.cat([sequence.lm_log_probs for sequence in sequences]).to(device, torch.float32)
        self.features = {name: _feature(sequences, name).to(device) for name in sorted(needs)}
        ids = torch.tensor([sequence.sample_id for sequence in sequences])
        self.sample_ids = ids.repeat_interleave(torch.from_numpy(lengths)).to(device)
        positions = np.arange(lengths.sum()) - np.repeat(self.starts, lengths)
        self.positions = torch.from_numpy(positions).to(device)
        count = len(self.targets)
        self.log_probs = torch.zeros(count, device=device)
        self.knn_log_probs = torch.zeros(count, temperatures, device=device)
        self.lmbda = torch.zeros(count, device=device)
        self.searched = torch.zeros(count, dtype=torch.bool, device=device)
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.matched = torch.zeros(count, dtype=torch.int64, device=device)

    def steps(self, sequential: bool, chunk: int) -> Iterator[Tensor]:
        """Flat positions of the tokens of each step: token t of every running sequence, or, when tokens do not depend
        on each other, chunks of all tokens."""
        if not sequential:
            yield from torch.arange(len(self.targets), device=self.device).split(chunk)
            return
        descending = self.lengths[self.order]
        starts = torch.from_numpy(self.starts[self.order]).to(self.device)
        running = np.searchsorted(-descending, -np.arange(descending.max(initial=0)), side="left")
        for position, count in enumerate(running.tolist()):
            yield starts[:count] + position

    def step(self, tokens: Tensor) -> Step:
        """What a retriever may see of these tokens."""
        features = {name: values[tokens] for name, values in self.features.items()}
        return Step(
            self.sample_ids[tokens], self.positions[tokens], self.queries[tokens], self.lm_log_probs[tokens], features
        )

    def store(
        self,
        tokens: Tensor,
        mixed: Tensor,
        knn: Tensor,
        lmbda: Tensor,
        searched: Tensor,
        candidates: Tensor,
        matched: Tensor,
    ) -> None:
        """Keeps the results of a step."""
        self.log_probs[tokens], self.knn_log_probs[tokens], self.lmbda[tokens] = mixed, knn, lmbda
        self.searched[tokens], self.candidates[tokens], self.matched[tokens] = searched, candidates, matched

    def results(self) -> list[RetrievalResult]:
        """One result per sequence; UserError when a log-probability is not a number."""
        if torch.isnan(self.log_probs).any():
            raise UserError("the retrieval produced a value that is not a number; check the datastore and index with k")
        log_probs, knn, lmbda = self.log_probs.cpu(), self.knn_log_probs.cpu(), self.lmbda.cpu()
        searched, candidates, matched = (t.cpu().numpy() for t in (self.searched, self.candidates, self.matched))
        results = []
        for sequence, start, length in zip(self.sequences, self.starts, self.lengths, strict=True):
            span = slice(start, start + length)
            results.append(
                RetrievalResult(
                    sequence.sample_id,
                    log_probs[span],
                    searched[span],
                    candidates[span],
                    matched[span],
                    lmbda[span],
                    knn[span],
                )
            )
        return results


def _feature(sequences: list[ScoredSequence], name: str) -> Tensor:
    """(tokens, ...): a feature of all sequences; UserError when they were scored without it."""
    if not all(name in sequence.features for sequence in sequences):
        raise UserError(
            f"--strategy: found scores without {name}, which this strategy needs; "
            "save them with eval_lm.py --save-scores DIR --save-features"
        )
    return torch.cat([sequence.features[name] for sequence in sequences])
