"""A language model and retrieval together, position by position: the distribution of the next token of B hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fairseq.generation.lm_steps import Computed, LMSteps
from fairseq.scored_sequences import ScoredSequence

if TYPE_CHECKING:
    from fairseq.retrieval_steps import Found, RetrievalSteps


@dataclass
class Position:
    """What may come next in B hypotheses. log_probs: (B, V) float32, nats, of the mixture, or of the model where there
    is no retrieval; lm_log_probs: (B, V) of the model; found: what retrieval found, or None."""

    log_probs: Tensor
    lm_log_probs: Tensor
    found: Found | None = None


class Positions:
    """B texts that are being written. retrieval: None for the model alone."""

    def __init__(self, lm: LMSteps, retrieval: RetrievalSteps | None = None) -> None:
        self.lm, self.retrieval = lm, retrieval

    def begin(self, prompts: Sequence[Tensor], sample_ids: Sequence[int] | None = None) -> Position:
        """Reads prompts, token ids (T,) each: their next tokens."""
        sequential = self.retrieval is not None and self.retrieval.retriever.sequential
        computed = self.lm.begin(prompts, whole=sequential)
        if self.retrieval is not None:
            queries, features, width = computed.queries, computed.features, computed.queries.shape[1]
            lengths = [len(prompt) for prompt in prompts]  # the position after a prompt's last token is not read yet
            self.retrieval.begin(
                [queries[row, width - 1 - length : width - 1] for row, length in enumerate(lengths)],
                prompts,
                [
                    {name: values[row, -1 - length : values.shape[1] - 1] for name, values in features.items()}
                    for row, length in enumerate(lengths)
                ] if sequential else None,
                sample_ids,
            )
        return self._next(computed)

    def score(self, tokens: Tensor) -> Tensor:
        """(T,) log-probabilities of a text's tokens (T,), nats, as an evaluation gives them."""
        if self.retrieval is None or not len(tokens):
            return self.lm.score(tokens)
        computed = self.lm.begin([tokens], whole=True, heads=len(tokens) + 1)
        lm_log_probs = computed.log_probs[0, :-1].gather(1, tokens.to(computed.log_probs.device)[:, None])[:, 0]
        features = {name: values[0, :-1] for name, values in computed.features.items()}
        scored = ScoredSequence(0, computed.queries[0, :-1].float(), tokens, lm_log_probs, features)
        return self.retrieval.knnlm.score([scored])[0].log_probs.cpu()

    def choose(self, tokens: Tensor, rows: Tensor) -> Position:
        """Appends tokens (n,) to the hypotheses `rows` (n,), which may be fewer or more than before: what comes next.
        Hypotheses that are missing have ended."""
        if self.retrieval is not None:
            self.retrieval.observe(tokens, rows)
        self.lm.take_rows(rows)
        return self._next(self.lm.extend(tokens[:, None]))

    def _next(self, computed: Computed) -> Position:
        lm_log_probs = computed.log_probs[:, -1]
        if self.retrieval is None:
            return Position(lm_log_probs, lm_log_probs)
        last = {name: values[:, -1] for name, values in computed.features.items()}
        found = self.retrieval.retrieve(computed.queries[:, -1], last)
        return Position(found.mix(lm_log_probs), lm_log_probs, found)

