"""Beam search: the best continuations of a prompt, as far as so many hypotheses at a time can tell.

A hypothesis is scored by its summed log-probability, divided by (its length) ** len_penalty when it is finished. What
retrieval and the model remember goes with the hypotheses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq.generation.choice import ChoiceSettings, Symbols, allowed, tempered
from fairseq.generation.positions import Position, Positions
from fairseq.generation.writing import Written, traces


@dataclass
class _Beam:
    """Live hypotheses: log-probabilities of their tokens (n, t), sums with penalties (n,), tokens (n, t), and what is
    known of each token, if that is wanted."""

    log_probs: Tensor
    totals: Tensor
    tokens: Tensor
    traces: list[list[dict[str, object]]] = field(default_factory=list)


def beam_search(
    positions: Positions,
    prompt: Tensor,
    beam: int,
    settings: ChoiceSettings,
    symbols: Symbols,
    len_penalty: float = 1.0,
    before: Tensor | None = None,
    number: int = 0,
    traced: bool = False,
) -> list[Written]:
    """The `beam` best continuations of a prompt, token ids (T,), best first; at the limit of length nothing but the end
    can follow, where there is one. before: (t,) log-probabilities of prompt tokens that count in the scores too, with
    their length."""
    before = torch.zeros(0) if before is None else before
    position = positions.begin([prompt], [number])
    limit = min(settings.limit(len(prompt)), positions.lm.longest - len(prompt))
    live = _Beam(torch.zeros(1, 0), before.sum().view(1), torch.zeros(1, 0, dtype=torch.int64), [[]])
    finished: list[Written] = []
    ends = torch.tensor(symbols.ends)
    for new in range(max(limit, 1)):
        log_probs = tempered(position.log_probs.cpu(), settings.temperature)
        options = allowed(log_probs, positions.lm.words[:, 1:].cpu(), new, settings, symbols)
        last = new + 1 >= limit
        if last:
            options = _only(options, symbols.ends)
        count = min(2 * beam, options.numel())
        best, flat = (live.totals[:, None] + options).view(-1).topk(count)
        rows, chosen = flat // options.shape[1], flat % options.shape[1]
        longer = _Beam(
            torch.cat([live.log_probs[rows], log_probs[rows, chosen][:, None]], 1),
            best,
            torch.cat([live.tokens[rows], chosen[:, None]], 1),
            _longer_traces(live, position, rows, chosen) if traced else [],
        )
        done = (torch.isin(chosen, ends) | last) & best.isfinite()
        for place in done[:beam].nonzero().flatten().tolist():
            total, ended = float(best[place]), int(chosen[place]) in symbols.ends
            finished.append(_finished(longer, place, number, total, len(before), len_penalty, ended))
        going = (~done & best.isfinite()).nonzero().flatten()[:beam]
        if len(finished) >= beam or not len(going):
            break
        position = positions.choose(chosen[going], rows[going])
        kept_traces = [longer.traces[i] for i in going.tolist()] if traced else []
        live = _Beam(longer.log_probs[going], best[going], longer.tokens[going], kept_traces)
    finished.sort(key=lambda written: -written.score)
    for sample, written in enumerate(finished[:beam]):
        written.sample = sample
    return finished[:beam]


def _only(options: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Nothing but the end; everything where no end is possible (a tokenizer without one, a least length)."""
    kept = options.new_full(options.shape, -math.inf)
    kept[:, list(ends)] = options[:, list(ends)]
    return kept if kept.isfinite().any() else options


def _longer_traces(live: _Beam, position: Position, rows: Tensor, chosen: Tensor) -> list[list[dict[str, object]]]:
    """What is known of the tokens of the hypotheses `rows` (n,), with a further token each, chosen (n,)."""
    new = traces(position, rows, chosen)
    return [[*live.traces[row], facts] for row, facts in zip(rows.tolist(), new, strict=True)]


def _finished(
    beam: _Beam, place: int, number: int, total: float, before: int, len_penalty: float, ended: bool
) -> Written:
    tokens = beam.tokens[place].tolist()
    score = total / (before + len(tokens)) ** len_penalty
    known = beam.traces[place] if beam.traces else []
    return Written(number, 0, tokens, beam.log_probs[place].tolist(), known, ended, ranked_by=score)
