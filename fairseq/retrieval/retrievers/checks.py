"""Checks of what a strategy returns, before anything is computed from it: a mistake in a strategy gives one sentence
that names the strategy, not a crash and not a wrong result. The checks cost a few small array operations per step, so
they are made for strategies from `--user-dir` and, with `--check-strategy always`, for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.errors import UserError
from fairseq.registry import is_built_in
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.retrievers.interface import Candidates, Proposal, Retriever, Step, Weights

CHOICES = ("auto", "always", "never")


def are_needed(retriever: Retriever, choice: str) -> bool:
    """Whether the strategy's return values are checked; choice: the value of `--check-strategy`."""
    return choice == "always" or (choice == "auto" and not is_built_in(type(retriever)))


class StrategyError(UserError):
    """A strategy returned a value that cannot be used. method: the method that returned it."""

    def __init__(self, strategy: str, method: str, found: str, expected: str) -> None:
        self.strategy, self.method = strategy, method
        super().__init__(f"--strategy {strategy}: {method} returned {found}, expected {expected}; correct its class")


class Checks:
    """Checks what the strategy `name` returns; size: number of entries of the datastore."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def proposal(self, proposal: Any, step: Step) -> None:
        """StrategyError unless `propose` returned a Proposal that fits the step."""
        if not isinstance(proposal, Proposal):
            self._fail("propose", f"a {type(proposal).__name__}", "a Proposal")
        self._array("propose", "search", proposal.search, (len(step),), (torch.bool,))
        if proposal.entries is not None:
            self._entries(proposal.entries, len(step))
        if proposal.lmbda is not None:
            self._lmbda("propose", proposal.lmbda, len(step))

    def weights(self, weights: Any, candidates: Candidates) -> None:
        """StrategyError unless `weigh` returned Weights that fit the candidates, or None."""
        if weights is None:
            return
        if not isinstance(weights, Weights):
            self._fail("weigh", f"a {type(weights).__name__}", "Weights or None")
        if weights.lmbda is not None:
            self._lmbda("weigh", weights.lmbda, candidates.tokens)
        if weights.votes is not None:
            self._votes("weigh", "votes", weights.votes, len(candidates.ids))

    def _entries(self, entries: Any, tokens: int) -> None:
        if not isinstance(entries, Entries):
            self._fail("propose", f"entries of type {type(entries).__name__}", "Entries")
        count = len(entries.ids) if isinstance(entries.ids, Tensor) and entries.ids.ndim else 0
        self._array("propose", "entries.rows", entries.rows, (count,), (torch.int64,))
        self._array("propose", "entries.ids", entries.ids, (count,), (torch.int64,))
        if entries.weights is not None:
            self._votes("propose", "entries.weights", entries.weights, count)
        if not count:
            return
        rows, ids = entries.rows, entries.ids
        if int(rows[0]) < 0 or int(rows[-1]) >= tokens or bool((rows[1:] < rows[:-1]).any()):
            found = f"entries.rows from {int(rows.min())} to {int(rows.max())}"
            self._fail("propose", found, f"rows in ascending order, from 0 to {tokens - 1}")
        least, most = torch.aminmax(ids)
        if int(least) < 0 or int(most) >= self.size:
            found = f"entries.ids from {int(least)} to {int(most)}"
            self._fail("propose", found, f"entries of the datastore, 0 to {self.size - 1}")
        if entries.bounds is not None:
            bounds = torch.searchsorted(rows, torch.arange(len(entries.bounds), device=rows.device))
            if entries.bounds.dtype != torch.int64 or not torch.equal(entries.bounds, bounds):
                self._fail("propose", "entries.bounds that do not fit entries.rows", "None, or where each row begins")

    def _lmbda(self, method: str, lmbda: Any, tokens: int) -> None:
        self._array(method, "lmbda", lmbda, (tokens,), (torch.float32, torch.float64))
        wrong = ~((lmbda >= 0) & (lmbda <= 1))  # NaN included
        if bool(wrong.any()):
            self._fail(method, f"a lmbda of {float(lmbda[wrong][0]):g}", "numbers from 0 to 1")

    def _votes(self, method: str, name: str, votes: Any, count: int) -> None:
        self._array(method, name, votes, (count,), (torch.float32,))
        wrong = ~((votes >= 0) & (votes < torch.inf))
        if bool(wrong.any()):
            self._fail(method, f"{name} with {float(votes[wrong][0]):g}", "finite numbers of at least 0")

    def _array(
        self, method: str, name: str, found: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        expected = f"a {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} tensor of shape {shape}"
        if not isinstance(found, Tensor):
            self._fail(method, f"{name} of type {type(found).__name__}", expected)
        if found.dtype not in dtypes or tuple(found.shape) != shape:
            kind = str(found.dtype).removeprefix("torch.")
            self._fail(method, f"{name} as {kind} of shape {tuple(found.shape)}", expected)

    def _fail(self, method: str, found: str, expected: str) -> None:
        raise StrategyError(self.name, method, found, expected)
