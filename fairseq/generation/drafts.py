"""Drafts: the text after a retrieved entry is a guess of what comes next, and one pass of the model reads all of it.
So is what followed when the end of the text occurred in it before, where no entry agrees with the text in more tokens.

A pass reads the token that was chosen last and a draft of L tokens, and so gives the distributions of L + 1 next
tokens. Each is mixed with retrieval as ever, and a token is chosen from it as ever, as long as the token before was the
draft's. So the text is that which is written without drafts: the likeliest tokens are compared with the draft, and
drawn ones too, which is speculative sampling (Leviathan et al., 2023) for drafts that are certain of their tokens.

Where a strategy remembers something from token to token, retrieval follows the draft position by position and searches
where it would search without drafts. Where it does not (kNN-LM), one search serves all positions of a pass, as in
speculative retrieval (RaLMSpec, Zhang et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.generation.choice import ChoiceSettings, Symbols
from fairseq.generation.positions import Position, Positions
from fairseq.generation.writing import Written, append_tokens

if TYPE_CHECKING:
    from fairseq.retrieval_steps import Found

SUFFIX = 16  # tokens before a pointer that are compared with the text
MOST_POINTERS = 256
LONGEST = 64  # tokens of a draft, whatever --draft says
TRY_AGAIN = 16  # passes without a draft, after which one is tried although few were accepted


class Drafter:
    """Follows pointers into the datastore beside retrieval, and proposes what follows the best one.

    values: (N,) of the datastore; text: token ids so far. A pointer is an entry that would be right next, because the
    entry before it had the right value. The best has the longest agreement of the tokens before it with the text; of
    those, one whose value most of them have."""

    def __init__(self, values: NDArray[np.integer], text: Sequence[int]) -> None:
        self.values, self.text = values, list(text)
        self.pointers = np.zeros(0, np.int64)
        self.agreement = np.zeros(0, np.int64)  # of each pointer, in tokens, at most SUFFIX

    def observe(self, token: int, matched: NDArray[np.int64]) -> None:
        """Takes the chosen token, and the entries that had it as their value, best first."""
        self.text.append(token)
        survivors = self.pointers[self.values[self.pointers] == token]
        entries = np.concatenate([survivors, matched])
        _, first = np.unique(entries, return_index=True)
        pointers = entries[np.sort(first)] + 1
        pointers = pointers[(pointers > 0) & (pointers < len(self.values))]
        found = agreement(self.values, pointers, np.array(self.text[-SUFFIX:], np.int64))
        order = np.argsort(-found, kind="stable")[:MOST_POINTERS]
        self.pointers, self.agreement = pointers[order], found[order]

    def best(self) -> tuple[int, NDArray[np.int64]]:
        """(agreement with the end of the text in tokens, the tokens that may come next): of a pointer, or of an earlier
        place of the text that agrees in more tokens; (0, none) where there is neither."""
        text = np.array(self.text, np.int64)
        earlier = np.flatnonzero(text[:-1] == text[-1]) + 1
        own = agreement(text, earlier, text)
        longest_own = int(own.max(initial=0))
        if len(self.pointers) and self.agreement[0] >= longest_own:
            chosen = self.pointers[self.agreement == self.agreement[0]]
            following = self.values[chosen]
            kinds, first, votes = np.unique(following, return_index=True, return_counts=True)
            start = int(chosen[first[votes == votes.max()].min()])
            return int(self.agreement[0]), np.asarray(self.values[start : start + LONGEST], np.int64)
        if longest_own:
            start = int(earlier[np.flatnonzero(own == longest_own)[-1]])
            return longest_own, text[start : start + LONGEST]
        return 0, text[:0]


def agreement(
    values: NDArray[np.integer], pointers: NDArray[np.int64], text: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n,): how many tokens before each of the pointers (n,) into `values` (N,) are those at the end of a text (T,), at
    most SUFFIX."""
    last = text[: -SUFFIX - 1 : -1]
    places = pointers[:, None] - 1 - np.arange(len(last))
    same = (values[np.maximum(places, 0)] == last) & (places >= 0)
    return np.logical_and.accumulate(same, 1).sum(1)


class DraftLength:
    """How many tokens to draft: by how many were accepted of drafts whose pointers agreed as much.

    A drafted token is worth reading when the probability that it is accepted, with all before it, exceeds `cost`: what
    it adds to the time of a pass, in passes. Where none is, one token is still tried now and then, since texts change.
    most: largest length, `--draft`."""

    def __init__(self, most: int, cost: float = 0.1) -> None:
        self.most, self.cost = most, cost
        self._accepted = np.ones(SUFFIX + 1)  # of drafted tokens, by agreement: begins as if 1 of 2 had been
        self._tried = np.full(SUFFIX + 1, 2.0)
        self._left_out = 0  # drafts, since the last that was tried

    def of(self, agreement: int) -> int:
        """The length for a pointer of this agreement."""
        rate = self._accepted[agreement] / self._tried[agreement]
        if rate <= self.cost:
            self._left_out = (self._left_out + 1) % TRY_AGAIN
            return 0 if self._left_out else min(self.most, 1)
        return min(self.most, int(np.log(self.cost) / np.log(min(rate, 0.999))))

    def learn(self, agreement: int, drafted: int, accepted: int) -> None:
        """Of a draft so many tokens were accepted; old drafts count less and less."""
        if drafted:
            self._accepted[agreement] = 0.95 * self._accepted[agreement] + accepted
            self._tried[agreement] = 0.95 * self._tried[agreement] + min(accepted + 1, drafted)


@dataclass
class DraftCounts:
    """What drafts brought: passes of the model after the prompt, tokens that were written, drafted, and accepted."""

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, tokens: int, drafted: int) -> None:
        """Another pass, which added so many tokens; all but the last were drafted."""
        self.passes += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += tokens - 1


class DraftedWriting:
    """Writes continuations with drafts, one at a time; `counts` adds up over all of them. most: tokens of a draft."""

    def __init__(
        self, positions: Positions, settings: ChoiceSettings, symbols: Symbols, most: int, traced: bool = False
    ) -> None:
        assert positions.retrieval is not None
        self.positions, self.settings, self.symbols, self.traced = positions, settings, symbols, traced
        self.retrieval, self.lm = positions.retrieval, positions.lm
        self.step_by_step = self.retrieval.retriever.sequential
        self.values = self.retrieval.knnlm.values.cpu().numpy()
        self.length, self.counts = DraftLength(most), DraftCounts()

    def write(self, prompt: Tensor, number: int = 0, sample: int = 0) -> Written:
        """The continuation of a prompt, token ids (T,)."""
        written = Written(number, sample)
        limit = min(self.settings.limit(len(prompt)), self.lm.longest - len(prompt) - 1)
        if limit <= 0:
            return written
        drafter = Drafter(self.values, prompt.tolist())
        position = self.positions.begin([prompt], [number])
        self._append(written, drafter, position)
        while not written.ended and len(written.tokens) < limit:
            agreed, following = drafter.best()
            draft = following[: min(self.length.of(agreed), limit - len(written.tokens) - 1)]
            new = self._read(written, drafter, draft)
            self.length.learn(agreed, len(draft), new - 1)
            self.counts.add(new, len(draft))
        return written

    def _read(self, written: Written, drafter: Drafter, draft: NDArray[np.int64]) -> int:
        """One pass of the model over the last token and a draft; gives the number of tokens that it added."""
        tokens = torch.tensor([[written.tokens[-1], *draft.tolist()]])
        computed = self.lm.extend(tokens)
        ahead: Found | None = None
        if not self.step_by_step:
            features = {name: values[0] for name, values in computed.features.items()}
            ahead = self.retrieval.retrieve_ahead(computed.queries[0], features)
        for place in range(len(draft) + 1):
            lm_log_probs = computed.log_probs[:, place]
            if ahead is None:
                now = {name: values[:, place] for name, values in computed.features.items()}
                found = self.retrieval.retrieve(computed.queries[:, place], now)
            else:
                found = ahead.of_rows(torch.tensor([place], device=self.retrieval.device))
            token = self._append(written, drafter, Position(found.mix(lm_log_probs), lm_log_probs, found))
            if written.ended or place == len(draft) or token != draft[place]:
                break
        self.lm.crop(len(draft) - place)
        return place + 1

    def _append(self, written: Written, drafter: Drafter, position: Position) -> int:
        """Chooses a token at a position, writes it down, and tells retrieval and the drafter."""
        assert position.found is not None
        row, new = torch.zeros(1, dtype=torch.int64), len(written.tokens)
        words = torch.tensor([drafter.text])
        token = append_tokens(position, row, words, new, [written], self.settings, self.symbols, self.traced)
        if self.step_by_step:
            outcome = self.retrieval.observe(token)
        else:
            outcome = self.retrieval.outcome(position.found, token)
            self.retrieval.advance(1)
        drafter.observe(int(token), outcome.matched.ids.cpu().numpy())
        return int(token)
