"""Retrieval one position at a time, for text that is being written: B hypotheses advance together; after a position
some may end, begin, or go on in several ways.

    steps = RetrievalSteps(knnlm)
    steps.begin(queries, tokens)                # prompts that have been read, a tensor for each
    found = steps.retrieve(queries)             # (B, D): candidates for the next token of each
    log_probs = found.mix(lm_log_probs)         # (B, V), of which the next tokens are chosen
    steps.observe(chosen, rows)                 # tokens, and which hypotheses go on with them

The search, the strategy and the equations are those of an evaluation (`knnlm`), so a generated text has the same
probabilities, and the same searches, when it is evaluated. Only the mass at the values of candidates is added to the
model's distribution: no array has the size of candidates times vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq.knnlm import KNNLM
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.retrievers import Candidates, Proposal, Step
from fairseq.retrieval.voting import Outcome, Searched, count_votes

NO_FEATURES: Mapping[str, Tensor] = {}


@dataclass
class Found:
    """What retrieval knows about the next token of B hypotheses, before it is chosen. lmbda: (B,) float32, the weight
    of retrieval."""

    step: Step
    proposal: Proposal
    searched: Searched
    given: Entries
    lmbda: Tensor
    values: Tensor
    temperature: float

    @functools.cached_property
    def candidates(self) -> Candidates:
        """The entries that vote for the next token, with scores and weights."""
        return Candidates.of(len(self.step), self.searched, self.given, self.values, self.temperature)

    @functools.cached_property
    def distribution(self) -> tuple[Tensor, Tensor, Tensor]:
        """p_kNN where it is not zero: rows (n,), token ids (n,) and probabilities (n,)."""
        return self.candidates.distribution()

    def mix(self, lm_log_probs: Tensor) -> Tensor:
        """log(lmbda p_kNN + (1 - lmbda) p_LM) of all tokens, (B, V) nats, from the model's (B, V)."""
        device = lm_log_probs.device
        lmbda = self.lmbda.to(device)
        mixed = lm_log_probs + torch.log1p(-lmbda)[:, None]
        rows, tokens, probabilities = (part.to(device) for part in self.distribution)
        mixed[rows, tokens] = torch.logaddexp(mixed[rows, tokens], lmbda.log()[rows] + probabilities.log())
        return mixed

    def of_rows(self, rows: Tensor) -> Found:
        """The same for the hypotheses `rows` (n,) int64, in this order, where one may occur several times."""
        step, searched, count = self.step, self.searched, len(self.step)
        place = rows.new_full((count,), -1)
        place[searched.rows] = torch.arange(len(searched.rows), device=rows.device)
        with_search = (place[rows] >= 0).nonzero().squeeze(1)
        chosen = place[rows][with_search]
        weights = None if searched.weights is None else searched.weights[chosen]
        features = {name: feature[rows] for name, feature in step.features.items()}
        proposal = self.proposal
        return Found(
            Step(step.sample_ids[rows], step.positions[rows], step.queries[rows], features),
            Proposal(proposal.search[rows], None, None if proposal.lmbda is None else proposal.lmbda[rows]),
            Searched(with_search, searched.ids[chosen], searched.scores[chosen], weights),
            self.given.of_rows(rows),
            self.lmbda[rows],
            self.values,
            self.temperature,
        )


class RetrievalSteps:
    """What retrieval remembers of B hypotheses, from position to position."""

    def __init__(self, knnlm: KNNLM) -> None:
        self.knnlm, self.retriever, self.device = knnlm, knnlm.retriever.twin(), knnlm.device
        self.sample_ids = self.positions = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.searches = self.steps = 0  # of hypotheses and positions, the prompts' included

    def begin(
        self,
        queries: Sequence[Tensor],
        tokens: Sequence[Tensor],
        features: Sequence[Mapping[str, Tensor]] | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> None:
        """Forgets everything, and reads B prompts.

        queries: for each prompt (T, D), which retrieve candidates for its tokens (T,), of which none need be there;
        features: what the strategy needs about them, each (T, ...); sample_ids: numbers of the prompts, 0, 1, ...
        unless given. All prompts end together, so the longest begins first."""
        count = len(queries)
        lengths = torch.tensor([len(prompt) for prompt in tokens], dtype=torch.int64, device=self.device)
        numbers = torch.arange(count) if sample_ids is None else torch.tensor(list(sample_ids))
        numbers, needs = numbers.to(self.device, torch.int64), self.retriever.needs
        self.retriever.start()
        if not self.retriever.sequential:  # nothing is remembered from token to token
            self.sample_ids, self.positions = numbers, lengths
            return
        order = torch.argsort(lengths, descending=True, stable=True)
        self.sample_ids = self.positions = numbers[:0]
        all_queries, all_tokens = _ending_together(queries, order), _ending_together(tokens, order)
        all_features = {name: _ending_together([part[name] for part in features or ()], order) for name in needs}
        longest = int(lengths.max()) if count else 0
        for place in range(longest):
            running = int((lengths >= longest - place).sum())
            self._grow(numbers[order[:running]])
            now = {name: feature[place, :running] for name, feature in all_features.items()}
            found = self.retrieve(all_queries[place, :running], now)
            self._observe(found, all_tokens[place, :running])
        self._grow(numbers[order])
        self.take_rows(torch.argsort(order))

    def _grow(self, sample_ids: Tensor) -> None:
        """New hypotheses behind those that are there, up to these."""
        new = len(sample_ids) - len(self.sample_ids)
        if new:
            begun = torch.arange(len(self.sample_ids), device=self.device)
            self.retriever.take_rows(torch.cat([begun, begun.new_full((new,), -1)]))
            self.sample_ids = sample_ids
            self.positions = torch.cat([self.positions, self.positions.new_zeros(new)])

    def retrieve(self, queries: Tensor, features: Mapping[str, Tensor] = NO_FEATURES) -> Found:
        """Candidates for the next token of each hypothesis, for queries (B, D). `observe` must follow."""
        self._found = self._retrieve(self.sample_ids, self.positions, queries, features)
        return self._found

    def retrieve_ahead(self, queries: Tensor, features: Mapping[str, Tensor] = NO_FEATURES) -> Found:
        """Candidates for the next n tokens of the only hypothesis, for queries (n, D), by one search: for strategies
        that are not sequential. `advance` must follow."""
        ahead = torch.arange(len(queries), device=self.device)
        return self._retrieve(self.sample_ids.expand(len(queries)), self.positions + ahead, queries, features)

    def advance(self, tokens: int) -> None:
        """So many tokens of `retrieve_ahead` have been kept."""
        self.positions = self.positions + tokens

    def _retrieve(
        self, sample_ids: Tensor, positions: Tensor, queries: Tensor, features: Mapping[str, Tensor]
    ) -> Found:
        features = {name: feature.to(self.device) for name, feature in features.items()}
        step = Step(sample_ids, positions, queries.to(self.device, torch.float32), features)
        proposal, searched, given = self.knnlm.retrieve(step, self.retriever)
        lmbda = step.queries.new_full((len(step),), self.knnlm.lmbda)
        if proposal.lmbda is not None:
            lmbda = proposal.lmbda.float()
        self.searches += len(searched.rows)
        self.steps += len(step)
        return Found(step, proposal, searched, given, lmbda, self.knnlm.values, self.knnlm.temperature)

    def observe(self, tokens: Tensor, rows: Tensor | None = None) -> Outcome:
        """Takes the tokens (n,) that were chosen after `retrieve`; gives log p_kNN of them, and the candidates that had
        them as their values.

        rows (n,) int64: hypothesis i goes on from what was hypothesis rows[i] with token i, which several may do, and
        those that are missing have ended. Without it, all go on in their order."""
        found, tokens = self._found, tokens.to(self.device)
        if rows is not None and not self._are_all(rows := rows.to(self.device)):
            found = found.of_rows(rows)
            self.take_rows(rows)
        return self._observe(found, tokens)

    def outcome(self, found: Found, tokens: Tensor) -> Outcome:
        """The votes of candidates for tokens (B,); changes nothing."""
        inverse = self.knnlm.inverse_temperatures
        return count_votes(found.searched, found.given, self.knnlm.values, tokens.to(self.device), inverse)

    def _observe(self, found: Found, tokens: Tensor) -> Outcome:
        outcome = self.outcome(found, tokens)
        self.retriever.observe(found.step, outcome.matched)
        self.positions = self.positions + 1
        return outcome

    def take_rows(self, rows: Tensor) -> None:
        """Hypothesis i goes on from what was hypothesis rows[i] (n,) int64, all with the tokens that they have."""
        rows = rows.to(self.device)
        if not self._are_all(rows):
            self.retriever.take_rows(rows)
            self.sample_ids, self.positions = self.sample_ids[rows], self.positions[rows]

    def _are_all(self, rows: Tensor) -> bool:
        return torch.equal(rows, torch.arange(len(self.sample_ids), device=self.device))


def _ending_together(prompts: Sequence[Tensor], order: Tensor) -> Tensor:
    """(T, B, ...): prompts, each (T or less, ...), in this order, with zeros before the shorter ones."""
    chosen = [prompts[row] for row in order.tolist()]
    return pad_sequence(chosen, padding_side="left") if chosen else torch.zeros(0, 0)


__all__ = ["Found", "RetrievalSteps"]
