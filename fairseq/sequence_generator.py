"""Beam search with language models, under fairseq's interface (the search itself is in `fairseq.generation`). Models
are averaged in probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.errors import UserError
from fairseq.generation.beam_search import beam_search
from fairseq.generation.choice import ChoiceSettings, Symbols
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.writing import Written


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
        lm = LMSteps(models, pad, start, device=prefix_tokens.device)
        return [self.search(Positions(lm), row[row.ne(pad)]) for row in prefix_tokens]

    def search(self, positions: Positions, prefix: Tensor) -> list[dict[str, Any]]:
        """The hypotheses that continue one prefix, token ids (T,), as `generate` gives them; positions: models, with
        retrieval or without."""
        before = positions.score(prefix)
        limit = int(min(self.max_len_a * len(prefix) + self.max_len_b, positions.lm.longest)) - len(prefix)
        settings = ChoiceSettings(
            temperature=self.temperature, min_len=self.min_len, unkpen=self.unk_penalty, max_len_b=max(limit, 1)
        )
        symbols = Symbols((self.dictionary.eos(),), self.dictionary.pad(), self.dictionary.unk())
        found = beam_search(positions, prefix, self.beam_size, settings, symbols, self.len_penalty, before)
        return [self._hypothesis(prefix, before, written) for written in found]

    def _hypothesis(self, prefix: Tensor, before: Tensor, written: Written) -> dict[str, Any]:
        return {
            "tokens": torch.cat([prefix, torch.tensor(written.tokens).to(prefix)]),
            "score": torch.tensor(written.score),
            "attention": None,
            "alignment": None,
            "positional_scores": torch.cat([before, torch.tensor(written.log_probs)]),
        }
