"""The rows of a batch without their padding, and the features of them that strategies may need."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq.errors import UserError
from fairseq.scored_sequences import contexts

NO_TOKEN = -1  # at padding
FROM_LOGITS = frozenset({"lm_max", "lm_entropy"})  # features that need the model's distribution at every token


@dataclass
class Texts:
    """Texts of a batch, longest first, each from column 0 on; what lies behind a text's end is arbitrary.

    rows (R,): the row of the batch that each one is; lengths (R,); tokens (R, L); queries (R, L, D), for the token
    after each; wanted (R, L): the place of each position among the log-probabilities that are wanted, negative for
    none; features: name -> (R, L, ...). All but queries are on the CPU."""

    rows: Tensor
    lengths: Tensor
    tokens: Tensor
    queries: Tensor
    wanted: Tensor
    features: dict[str, Tensor]

    @classmethod
    def of(
        cls, rows: Tensor, tokens: Tensor, queries: Tensor, log_probs: Tensor, needs: Collection[str], beginning: int
    ) -> Texts:
        """Those in some rows (R,) of tokens (B, T) with queries (B, T, D) and the model's log-probabilities (B, m, V)
        for the token after each of the last m positions. needs, beginning: see `features_of`."""
        present = tokens[rows] != NO_TOKEN
        lengths = present.sum(1)
        order = torch.argsort(lengths, descending=True, stable=True)
        rows, lengths = rows[order], lengths[order]
        place = torch.argsort(~present[order], dim=1, stable=True)[:, : int(lengths.max())]
        compact = tokens[rows[:, None], place]
        wanted = place - (tokens.shape[1] - log_probs.shape[1])
        features = features_of(compact, log_probs[rows], wanted, needs, beginning)
        return cls(rows, lengths, compact, queries[rows[:, None], place], wanted, features)

    def running(self, column: int) -> int:
        """How many texts reach this column: the first ones."""
        return int((self.lengths > column).sum())

    def at(self, column: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries (count, D) and features of the first `count` texts in a column."""
        return self.queries[:count, column], {name: part[:count, column] for name, part in self.features.items()}

    def ends(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries (R, D) and features of the last token of each text."""
        texts, last = torch.arange(len(self.rows)), self.lengths - 1
        return self.queries[texts, last], {name: part[texts, last] for name, part in self.features.items()}

    def before_ends(self) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """For each text, queries, the tokens that follow them, and features, up to its last token. UserError for a row
        of padding alone."""
        if not bool(self.lengths.all()):
            raise UserError("attached retrieval: found a row of padding alone, expected a token to go on from in each")
        parts = [slice(0, length - 1) for length in self.lengths.tolist()]
        queries = [row[part] for row, part in zip(self.queries, parts, strict=True)]
        following = [row[1:length] for row, length in zip(self.tokens, self.lengths.tolist(), strict=True)]
        named = self.features.items()
        return queries, following, [{name: f[row, part] for name, f in named} for row, part in enumerate(parts)]


def features_of(
    tokens: Tensor, log_probs: Tensor, wanted: Tensor, needs: Collection[str], beginning: int
) -> dict[str, Tensor]:
    """The features `needs` for the token after each of tokens (R, L); those of the model's distribution come from
    log_probs (R, m, V) at the places `wanted` (R, L). beginning: stands for the tokens before the start of a text."""
    features = {}
    if "context" in needs:
        features["context"] = contexts(tokens, beginning)
    if FROM_LOGITS & set(needs):
        place = wanted.clamp(min=0).to(log_probs.device)
        largest = log_probs.amax(2).exp()
        entropy = torch.stack([-(row.exp() * row.clamp(min=-1e4)).sum(1) for row in log_probs])
        for name, values in (("lm_max", largest), ("lm_entropy", entropy)):
            features[name] = values.gather(1, place).cpu()
    return {name: feature for name, feature in features.items() if name in needs}


def last_tokens(tokens: Tensor, count: int, beginning: int) -> Tensor:
    """(B, count): the last tokens of each row of (B, L), padding left out; `beginning` where a row has fewer."""
    order = torch.argsort(tokens != NO_TOKEN, dim=1, stable=True)
    ends = F.pad(tokens.gather(1, order), (count, 0), value=NO_TOKEN)[:, -count:]
    return ends.masked_fill(ends == NO_TOKEN, beginning)
