"""Writes continuations of prompts, many at a time: the likeliest token after each position, or a drawn one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq.generation.choice import ChoiceSettings, Symbols, allowed, choose, random_numbers
from fairseq.generation.positions import Position, Positions

MOST_SHOWN = 5  # entries of a token's trace


@dataclass
class Written:
    """A continuation. prompt, sample: numbers of the prompt, and of the sample among those of one prompt; tokens: (n,)
    the new ones, with the end if it was reached; log_probs: (n,) of the mixture, nats; trace: for each token what is
    known of it, if that was wanted; ended: whether the end was reached."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    ranked_by: float | None = None

    @property
    def score(self) -> float:
        """What beam search ranked it by, else the mean of `log_probs` (0 for nothing)."""
        if self.ranked_by is not None:
            return self.ranked_by
        return sum(self.log_probs) / max(1, len(self.log_probs))


def write(
    positions: Positions,
    prompts: Sequence[Tensor],
    settings: ChoiceSettings,
    symbols: Symbols,
    samples: int = 1,
    numbers: Sequence[int] | None = None,
    traced: bool = False,
) -> list[list[Written]]:
    """For each prompt, token ids (T,), so many continuations; numbers: of the prompts, 0, 1, ... unless given."""
    numbers = list(range(len(prompts))) if numbers is None else list(numbers)
    results = [[Written(number, sample) for sample in range(samples)] for number in numbers]
    limits = [min(settings.limit(len(p)), positions.lm.longest - len(p) - 1) for p in prompts]
    position, new = positions.begin(prompts, numbers), 0
    kept = [row for row, limit in enumerate(limits) if limit > 0]
    live = [(written, limits[row]) for row in kept for written in results[row]]
    rows = torch.tensor(kept, dtype=torch.int64).repeat_interleave(samples)
    while live:
        writing = [written for written, _ in live]
        tokens = append_tokens(position, rows, positions.lm.words[:, 1:], new, writing, settings, symbols, traced)
        new += 1
        going = [i for i, (written, limit) in enumerate(live) if not written.ended and len(written.tokens) < limit]
        if going:
            position = positions.choose(tokens[going], rows[going])
        live, rows = [live[i] for i in going], torch.arange(len(going))
    return results


def append_tokens(
    position: Position,
    rows: Tensor,
    words: Tensor,
    new: int,
    writing: Sequence[Written],
    settings: ChoiceSettings,
    symbols: Symbols,
    traced: bool = False,
) -> Tensor:
    """Chooses a token for each of the hypotheses `rows` (n,) of a position and appends it to `writing`; gives the
    tokens (n,). words: (B, T) what stands before the position in its B hypotheses, of which `new` tokens are new."""
    log_probs = position.log_probs.cpu()[rows]
    possible = allowed(log_probs, words.cpu()[rows], new, settings, symbols)
    random = None
    if settings.sampling:
        random = random_numbers(settings.seed, [w.prompt for w in writing], [w.sample for w in writing], new)
    tokens = choose(possible, settings, random)
    chosen = log_probs.gather(1, tokens[:, None])[:, 0]
    for written, token, log_prob in zip(writing, tokens.tolist(), chosen.tolist(), strict=True):
        written.tokens.append(token)
        written.log_probs.append(log_prob)
        written.ended = token in symbols.ends
    if traced:
        for written, facts in zip(writing, traces(position, rows, tokens), strict=True):
            written.trace.append(facts)
    return tokens


def traces(position: Position, rows: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
    """What is known of tokens (n,) that were chosen for the hypotheses `rows` (n,) of a position: log-probabilities of
    the mixture, the model and retrieval (nats, None where retrieval gives a token none), lambda, whether the index was
    searched, and the entries that had most weight, with their share of p_kNN."""
    facts: list[dict[str, Any]] = []
    found = position.found
    shares = None if found is None else found.candidates.shares()
    for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        own: dict[str, Any] = {
            "log_prob": float(position.log_probs[row, token]),
            "lm_log_prob": float(position.lm_log_probs[row, token]),
        }
        if found is not None and shares is not None:
            at = (found.candidates.rows == row).nonzero().squeeze(1)
            share = shares[at]
            probability = float(share[found.candidates.values[at] == token].sum())
            best = at[share.topk(min(MOST_SHOWN, len(at))).indices]
            own |= {
                "knn_log_prob": float(torch.tensor(probability).log()) if probability > 0 else None,
                "lmbda": float(found.lmbda[row]),
                "searched": bool(found.proposal.search[row]),
                "candidates": len(at),
                "entries": [
                    {"entry": int(found.candidates.ids[i]), "token": int(found.candidates.values[i]),
                     "share": round(float(shares[i]), 6)}
                    for i in best.tolist()
                ],
            }
        facts.append(own)
    return facts
