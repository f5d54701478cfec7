"""Language models one or several positions at a time, for B hypotheses that advance together: log-probabilities of the
next token, and the queries with which retrieval is asked about it.

What a model computed for earlier positions is kept in a dict that belongs to the hypotheses (`incremental_state`).
Prompts of unequal length are padded on the left, so that all hypotheses end at the same position."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq.key_types import keys_of
from fairseq.scored_sequences import contexts
from fairseq.sequence_scorer import CHUNK_ELEMENTS, spread, whole_log_probs


@dataclass
class Computed:
    """What the models know after each of n positions of B hypotheses. log_probs: (B, n, V) float32 of the next token,
    nats; queries: (B, n, D), those of the first model; features: what a strategy needs, each (B, n, ...)."""

    log_probs: Tensor
    queries: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


class LMSteps:
    """Models, averaged in probability, and what they remember of B hypotheses.

    start: the token that stands before every text; key_type: of the queries, or None; needs: features
    (`scored_sequences.FEATURES`) that are wanted for each position."""

    def __init__(
        self,
        models: Sequence[Any],
        pad: int,
        start: int,
        key_type: str | None = None,
        needs: Collection[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.models, self.pad, self.start, self.key_type = list(models), pad, start, key_type
        self.needs, self.device = frozenset(needs), torch.device(device)
        self.words = torch.zeros(0, 0, dtype=torch.int64)
        self._states: list[dict[str, Any]] = []

    @property
    def longest(self) -> int:
        """Largest number of tokens of a text with its start."""
        limits = [model.max_positions() or math.inf for model in self.models]
        return int(min(*limits, 1 << 40))

    def begin(self, prompts: Sequence[Tensor], whole: bool = False, heads: int = 1) -> Computed:
        """Forgets everything and reads B prompts, token ids (T,) each. Gives log-probabilities for the last `heads`
        positions, queries for all, features for the last one or, if `whole`, for all."""
        for model in self.models:
            model.eval()
        self._states = [{} for _ in self.models]
        first = torch.tensor([self.start])
        rows = [torch.cat([first, prompt.cpu().long()]) for prompt in prompts]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.pad, padding_side="left")
        self.words = padded[:, :0].to(self.device)
        return self._feed(padded, heads=heads, features=padded.shape[1] if whole else 1)

    def score(self, tokens: Tensor) -> Tensor:
        """(T,) log-probabilities of a text's tokens (T,), nats."""
        log_probs = self.begin([tokens], heads=len(tokens) + 1).log_probs[0, :-1].cpu()
        return log_probs.gather(1, tokens.cpu()[:, None])[:, 0]

    def extend(self, tokens: Tensor) -> Computed:
        """Reads n further tokens (B, n) of each hypothesis."""
        return self._feed(tokens, heads=tokens.shape[1], features=tokens.shape[1])

    def take_rows(self, rows: Tensor) -> None:
        """Hypothesis i goes on from what was hypothesis rows[i] (n,) int64."""
        rows = rows.to(self.device)
        if torch.equal(rows, torch.arange(len(self.words), device=self.device)):
            return
        self.words = self.words[rows]
        for model, state in zip(self.models, self._states, strict=True):
            reorder = getattr(model.decoder, "reorder_incremental_state", None)
            if reorder is not None:
                reorder(state, rows)

    def crop(self, count: int) -> None:
        """Forgets the last `count` positions."""
        if not count:
            return
        self.words = self.words[:, :-count]
        for number, model in enumerate(self.models):
            crop = getattr(model.decoder, "crop_incremental_state", None)
            if crop is None:
                self._states[number] = {}  # everything is read again
            else:
                crop(self._states[number], count)

    @torch.no_grad()
    def _feed(self, tokens: Tensor, heads: int, features: int) -> Computed:
        """Reads tokens (B, n); log-probabilities for the last `heads` positions, features for the last `features`."""
        new = tokens.shape[1]
        self.words = torch.cat([self.words, tokens.to(self.words)], 1)
        outputs = []
        for model, state in zip(self.models, self._states, strict=True):
            able = getattr(model, "supports_features_only", False)
            outputs.append(model(self.words, incremental_state=state, **({"features_only": True} if able else {})))
        first, extra = outputs[0]
        queries = first.new_zeros(len(first), new, 0)
        if self.key_type is not None:
            queries = keys_of(self.key_type, extra, *first.shape[:2])[-new:].transpose(0, 1)
        computed = Computed(self._log_probs(outputs, slice(-heads, None)), queries)
        if self.needs:
            computed.features = self._features(outputs, features, computed.log_probs)
        return computed

    def _log_probs(self, outputs: Sequence[Any], positions: slice) -> Tensor:
        """(B, n, V) float32, averaged over the models."""
        return whole_log_probs(self.models, [(hidden[:, positions], extra) for hidden, extra in outputs])

    def _features(self, outputs: Sequence[Any], count: int, last: Tensor) -> dict[str, Tensor]:
        """The features of the last `count` positions; `last`: log-probabilities that are known already."""
        made: dict[str, Tensor] = {}
        if "context" in self.needs:
            known = self.words.masked_fill(self.words == self.pad, self.start)
            made["context"] = contexts(known, self.start)[:, -count:]
        if self.needs & {"lm_max", "lm_entropy"}:
            parts, step = [], max(1, CHUNK_ELEMENTS // (last.shape[0] * last.shape[2]))
            for begin in range(-count, -last.shape[1], step):
                parts.append(spread(self._log_probs(outputs, slice(begin, min(begin + step, -last.shape[1])))))
            parts.append(spread(last))
            made["lm_max"], made["lm_entropy"] = (torch.cat(of_all, 1) for of_all in zip(*parts, strict=True))
        return {name: made[name] for name in self.needs}
