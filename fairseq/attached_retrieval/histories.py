"""The retrieval state of each row of a batch while a model reads or writes it.

A row's state is a function of the tokens that the row has had. So when beams are reordered, dropped or copied, each row
of the next pass finds its state by its tokens: no record of who came from whom is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.attached_retrieval.texts import NO_TOKEN, Texts, features_of, last_tokens
from fairseq.errors import UserError
from fairseq.knnlm import CHUNK_CANDIDATES, KNNLM
from fairseq.retrieval_steps import Found, RetrievalSteps
from fairseq.scored_sequences import CONTEXT_TOKENS


class Histories:
    """The states of B rows. tokens (B, L) int64 on the CPU: all tokens so far, NO_TOKEN where there is padding;
    beginning: the token that stands before a text in the features of strategies that read tokens."""

    def __init__(self, knnlm: KNNLM, beginning: int = 0) -> None:
        self.knnlm, self.beginning, self.steps = knnlm, beginning, RetrievalSteps(knnlm)
        self.needs = knnlm.retriever.needs
        self.forget()

    def forget(self) -> None:
        """Drops all states: what comes next is the beginning of a text."""
        self.tokens = torch.empty(0, 0, dtype=torch.int64)
        self._rows = torch.empty(0, dtype=torch.int64)  # (B,): which hypothesis of `steps` has each row's state
        self._unread: Texts | None = None  # texts of which only the log-probabilities were wanted so far

    def take_rows(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was, for rows (B',) int64."""
        self.tokens, self._rows = self.tokens[rows], self._rows[rows]

    def advance(self, tokens: Tensor, queries: Tensor, log_probs: Tensor) -> None:
        """Reads on to `tokens` (B, L), the whole history of each row; queries (B, n, D) of the last n positions.

        log_probs (B, m, V): the model's log-probabilities for the token after each of the last m positions, which are
        replaced by those of the mixture; those of padding stay. UserError where a row does not continue one that is
        known, or has padding inside."""
        before = self._continued(tokens, queries.shape[1], log_probs.shape[1])
        try:
            if before is None:
                self.forget()
                self._begin(tokens, queries, log_probs)
            else:
                self.take_rows(before)
                self._go_on(tokens, queries, log_probs)
        except BaseException:
            self.forget()
            raise
        self.tokens = tokens

    def _continued(self, tokens: Tensor, new: int, wanted: int) -> Tensor | None:
        """(B,): the row that each row of `tokens` continues; None when a text begins, which takes that all its
        positions are among the `new` ones. Rows go on only where none of the `wanted` last positions has been read."""
        length = self.tokens.shape[1]
        if length and tokens.shape[1] - new <= length <= tokens.shape[1] - wanted:
            start = tokens[:, :length]
            if torch.equal(start, self.tokens):
                return torch.arange(len(tokens))
            known = {row.numpy().tobytes(): place for place, row in enumerate(self.tokens)}
            found = [known.get(row.numpy().tobytes(), -1) for row in start.contiguous()]
            if -1 not in found:
                return torch.tensor(found)
        if new == tokens.shape[1]:
            return None
        raise UserError(
            "attached retrieval: found a cache with tokens that retrieval has not read in this order, expected one "
            "that was filled while it was attached; begin with an empty cache, and generate without drafts (neither "
            "assistant_model nor prompt_lookup_num_tokens)"
        )

    # -- the beginning of texts

    def _begin(self, tokens: Tensor, queries: Tensor, log_probs: Tensor) -> None:
        """The beginning of texts, of which equal ones (a prompt's beams) are read once."""
        different, text_of = torch.unique(tokens, dim=0, return_inverse=True)
        rows = torch.full((len(different),), len(tokens))
        rows.scatter_reduce_(0, text_of, torch.arange(len(tokens)), "amin")
        texts = Texts.of(rows, tokens, queries, log_probs, self.needs, self.beginning)
        place = torch.full((len(tokens),), -1)
        place[texts.rows] = torch.arange(len(rows))
        self._rows = place[rows[text_of]]
        if log_probs.shape[1] == 1 and bool((tokens[:, -1] != NO_TOKEN).all()):
            _put(self._read(texts), texts.rows, torch.zeros_like(rows), log_probs)
        else:
            self._unread = texts
            self._score(texts, log_probs)
        if len(rows) < len(tokens):
            log_probs.copy_(log_probs[rows[text_of]])

    def _read(self, texts: Texts) -> Found:
        """Makes the states of texts; gives the candidates for the token after each."""
        queries, following, features = texts.before_ends()
        self.steps.begin(queries, following, features, texts.rows.tolist())
        self._unread = None
        return self.steps.retrieve(*texts.ends())

    def _score(self, texts: Texts, log_probs: Tensor) -> None:
        """The mixture at all positions of texts."""
        steps = RetrievalSteps(self.knnlm)
        if self.knnlm.retriever.sequential:
            self._score_together(steps, texts, log_probs)
            return
        chunk = max(1, CHUNK_CANDIDATES // self.knnlm.k)
        for number, length in enumerate(texts.lengths.tolist()):
            features = {name: feature[number] for name, feature in texts.features.items()}
            self._begin_empty(steps, texts, slice(number, number + 1))
            for start in range(0, length, chunk):
                part = slice(start, min(start + chunk, length))
                now = {name: feature[part] for name, feature in features.items()}
                found = steps.retrieve_ahead(texts.queries[number, part], now)
                wanted = texts.wanted[number, part]
                _put(found, texts.rows[number].expand(len(wanted)), wanted, log_probs)
                steps.advance(len(wanted))

    def _score_together(self, steps: RetrievalSteps, texts: Texts, log_probs: Tensor) -> None:
        self._begin_empty(steps, texts, slice(0, texts.running(0)))
        for column in range(texts.tokens.shape[1]):
            running = texts.running(column)
            if column:
                steps.observe(texts.tokens[:running, column], torch.arange(running))
            found = steps.retrieve(*texts.at(column, running))
            _put(found, texts.rows[:running], texts.wanted[:running, column], log_probs)

    @staticmethod
    def _begin_empty(steps: RetrievalSteps, texts: Texts, part: slice) -> None:
        """New hypotheses for some of the texts, before their first token."""
        rows = texts.rows[part].tolist()
        features = {name: feature[0, :0] for name, feature in texts.features.items()}
        steps.begin([texts.queries[0, :0]] * len(rows), [texts.tokens[0, :0]] * len(rows), [features] * len(rows), rows)

    # -- their continuation

    def _go_on(self, tokens: Tensor, queries: Tensor, log_probs: Tensor) -> None:
        """The next positions of rows that have begun."""
        start, length = self.tokens.shape[1], tokens.shape[1]
        if bool((tokens[:, start:] == NO_TOKEN).any()):
            expected = "an attention_mask of 1 for all tokens after the first pass"
            raise UserError(f"attached retrieval: found padding after the beginning of a text, expected {expected}")
        if self._unread is not None:
            self._read(self._unread)
        rows, everyone = self._rows, torch.arange(len(tokens))
        before, first = length - queries.shape[1], length - log_probs.shape[1]
        for place in range(start, length):
            self.steps.observe(tokens[:, place], rows)
            self._rows = rows = everyone
            wanted = torch.full_like(rows, place - first)
            features = self._features(tokens[:, : place + 1], log_probs, wanted)
            found = self.steps.retrieve(queries[:, place - before], features)
            _put(found, rows, wanted, log_probs)

    def _features(self, tokens: Tensor, log_probs: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Those of the token after tokens (B, L)."""
        if not self.needs:
            return {}
        context = last_tokens(tokens, CONTEXT_TOKENS, self.beginning)
        places = wanted[:, None].expand_as(context)
        features = features_of(context, log_probs, places, self.needs, self.beginning)
        return {name: feature[:, -1] for name, feature in features.items()}


def _put(found: Found, rows: Tensor, wanted: Tensor, log_probs: Tensor) -> None:
    """Replaces log_probs (B, m, V) at rows (n,) and places (n,), where these are not negative, by the mixture."""
    if bool((wanted < 0).all()):
        return
    mixed = found.mix(log_probs[rows, wanted.clamp(min=0)])
    kept = wanted >= 0
    log_probs[rows[kept], wanted[kept]] = mixed[kept]
