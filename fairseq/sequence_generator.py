"""Beam search with language models, under fairseq's interface: continues given tokens with the most likely ones.

A hypothesis is scored by its summed log-probability, divided by (its length) ** len_penalty when it is finished. Models
are averaged in probability. Sampling is in `fairseq.hub_utils`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import UserError


class SequenceGenerator:
    """`generate(models, sample)`: the `beam_size` best continuations of each row.

    A row of n tokens is continued to at most max_len_a * n + max_len_b tokens in all (and what the models can hold), at
    least `min_len` of them new, the final eos included. `unk_penalty` is subtracted from the log-probability of unk."""

    def __init__(
        self,
        tgt_dict: Any,
        beam_size: int = 1,
        max_len_a: float = 0,
        max_len_b: int = 200,
        min_len: int = 1,
        normalize_scores: bool = True,
        len_penalty: float = 1.0,
        unk_penalty: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        if beam_size < 1 or temperature <= 0:
            raise UserError(f"found beam_size {beam_size} and temperature {temperature}, expected positive numbers")
        self.dictionary, self.beam_size = tgt_dict, beam_size
        self.max_len_a, self.max_len_b, self.min_len = max_len_a, max_len_b, min_len
        self.len_penalty = len_penalty if normalize_scores else 0.0
        self.unk_penalty, self.temperature = unk_penalty, temperature

    @torch.no_grad()
    def generate(
        self,
        models: list[Any],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        bos_token: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """For each row a list of hypotheses, best first: tokens (t,) with the prefix, score, positional_scores (t,) in
        nats (the prefix's too); attention and alignment are None.

        The prefixes are `prefix_tokens` (B, P), padded on the right, else the sample's src_tokens without their first
        token. `bos_token` precedes them: eos unless given, as in training."""
        if prefix_tokens is None:
            prefix_tokens = sample["net_input"]["src_tokens"][:, 1:]
        start = self.dictionary.eos() if bos_token is None else bos_token
        pad = self.dictionary.pad()
        return [self._search(models, row[row.ne(pad)], start) for row in prefix_tokens]

    def _search(self, models: list[Any], prefix: Tensor, start: int) -> list[dict[str, Any]]:
        eos, beam = self.dictionary.eos(), self.beam_size
        holds = min([model.max_positions() or math.inf for model in models])
        limit = int(min(self.max_len_a * len(prefix) + self.max_len_b, holds))
        words = torch.cat([prefix.new_tensor([start]), prefix])[None]  # (live, t + 1)
        states: list[dict[str, Any]] = [{} for _ in models]
        log_probs = self._log_probs(models, words, states)[0]
        positional = log_probs[:-1].gather(1, prefix[:, None]).view(1, -1)  # (live, t)
        totals = positional.sum(1)  # (live,), with penalties
        log_probs = log_probs[-1:]  # (live, V)
        finished: list[dict[str, Any]] = []
        for length in range(len(prefix) + 1, max(limit, len(prefix) + 1) + 1):
            allowed = self._penalised(log_probs, new=length - len(prefix), last=length >= limit)
            best, flat = (totals[:, None] + allowed).view(-1).topk(min(2 * beam, allowed.numel()))
            rows, chosen = flat // allowed.size(1), flat % allowed.size(1)
            scores = torch.cat([positional[rows], log_probs[rows, chosen][:, None]], dim=1)
            longer = torch.cat([words[rows], chosen[:, None].to(words)], dim=1)
            ends = chosen.eq(eos) & best.isfinite()
            for place in ends[:beam].nonzero().flatten().tolist():
                finished.append(self._hypothesis(longer[place, 1:], scores[place], best[place]))
            live = (~ends & best.isfinite()).nonzero().flatten()[:beam]
            if len(finished) >= beam or not len(live):
                break
            words, positional, totals = longer[live], scores[live], best[live]
            for model, state in zip(models, states, strict=True):
                reorder = getattr(model.decoder, "reorder_incremental_state", None)
                if reorder is not None:
                    reorder(state, rows[live])
            log_probs = self._log_probs(models, words, states)[:, -1]
        finished.sort(key=lambda hypothesis: hypothesis["score"].item(), reverse=True)
        return finished[:beam]

    def _log_probs(self, models: list[Any], words: Tensor, states: list[dict[str, Any]]) -> Tensor:
        """(live, n, V) float32: log-probabilities after each of the last n words, those that were not seen before."""
        per_model = []
        for model, state in zip(models, states, strict=True):
            model.eval()
            output = model(words, incremental_state=state)
            log_probs = model.get_normalized_probs(output, True, None).float()
            if self.temperature != 1:
                log_probs = (log_probs / self.temperature).log_softmax(-1)  # the same as dividing logits
            per_model.append(log_probs)
        return torch.stack(per_model).logsumexp(dim=0) - math.log(len(models))

    def _penalised(self, log_probs: Tensor, new: int, last: bool) -> Tensor:
        """What may come next: no pad, no end before `min_len` new tokens, nothing but the end at the limit."""
        allowed = log_probs.clone()
        eos = self.dictionary.eos()
        allowed[:, self.dictionary.pad()] = -math.inf
        allowed[:, self.dictionary.unk()] -= self.unk_penalty
        if last:
            end = allowed[:, eos].clone()
            allowed.fill_(-math.inf)[:, eos] = end
        elif new < self.min_len:
            allowed[:, eos] = -math.inf
        return allowed

    def _hypothesis(self, tokens: Tensor, positional: Tensor, total: Tensor) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "score": total / len(tokens) ** self.len_penalty,
            "attention": None,
            "alignment": None,
            "positional_scores": positional,
        }
