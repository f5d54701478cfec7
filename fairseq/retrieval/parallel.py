"""Dividing sequences among the CPU's threads. When each step depends on the step before, a single step is too short to
be divided. So each thread processes some of the sequences, with a strategy object of its own."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable

from fairseq.retrieval import kernels
from fairseq.retrieval.lockstep import RetrievalResult
from fairseq.retrieval.retrievers import Retriever
from fairseq.scored_sequences import ScoredSequence

STEP_COST = 6  # fixed cost of a step, in units of the cost of a token


class Team:
    """A strategy and copies of it, one for each thread. `stopped` is set when a thread has failed, so that the other
    threads end early."""

    def __init__(self, retriever: Retriever) -> None:
        self.retrievers = [retriever]
        self.stopped = threading.Event()

    def score(
        self,
        sequences: list[ScoredSequence],
        threads: int,
        score: Callable[[list[ScoredSequence], Retriever], list[RetrievalResult]],
    ) -> list[RetrievalResult]:
        """A result for each sequence; each thread calls `score(sequences, strategy)` with some of the sequences."""
        parts = parts_of_like_length([len(sequence) for sequence in sequences], threads)
        missing = len(parts) - len(self.retrievers)
        self.retrievers += [self.retrievers[0].twin() for _ in range(missing)]
        self.stopped.clear()
        try:
            found = kernels.each_in_thread(
                score, [[sequences[i] for i in part] for part in parts], self.retrievers[: len(parts)]
            )
        except BaseException:
            self.stopped.set()
            raise
        placed = dict(zip(itertools.chain.from_iterable(parts), itertools.chain.from_iterable(found), strict=True))
        return [placed[i] for i in range(len(sequences))]


def parts_of_like_length(lengths: list[int], most: int) -> list[list[int]]:
    """Positions of sequences of these lengths, divided into at most `most` parts of about equal cost.

    Each part has sequences of similar length, the first part the longest ones: a part needs as many steps as its
    longest sequence, and a step has a fixed cost however few sequences are left."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def filled(limit: int) -> list[list[int]]:
        parts: list[list[int]] = []
        cost = limit
        for i in longest_first:
            if not parts or cost + lengths[i] > limit:
                parts.append([])
                cost = STEP_COST * lengths[i]
            parts[-1].append(i)
            cost += lengths[i]
        return parts

    costs = range((STEP_COST + 1) * sum(lengths) + 1)
    return filled(bisect.bisect_left(costs, True, key=lambda limit: len(filled(limit)) <= most))
