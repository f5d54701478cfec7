"""How the next token is chosen from a distribution: what is allowed, and the likeliest or a drawn one of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.errors import BadFlag

NUMBERS = {"int": "an integer", "float": "a number"}  # types of settings, and what is expected of their values


def is_number(kind: str, value: Any) -> bool:
    """Whether a program passed a value of a kind of `NUMBERS`; True and False are none."""
    of = Integral if kind == "int" else Real
    return isinstance(value, of) and not isinstance(value, bool)


@dataclass(frozen=True)
class ChoiceSettings:
    """Under the names of fairseq's flags. sampling_topk: draw from so many of the likeliest tokens (-1: all);
    sampling_topp: from the fewest likeliest tokens with this probability in all (-1: all); temperature: by which
    log-probabilities are divided; min_len: tokens that are written before a text may end, its end included; unkpen:
    nats that are subtracted from unk; no_repeat_ngram_size: no sequence of so many tokens occurs twice in a text,
    prompt included (0: it may); max_len_a, max_len_b: at most max_len_a times the prompt's tokens plus max_len_b new
    ones."""

    sampling: bool = False
    sampling_topk: int = -1
    sampling_topp: float = -1.0
    temperature: float = 1.0
    min_len: int = 1
    unkpen: float = 0.0
    no_repeat_ngram_size: int = 0
    max_len_a: float = 0.0
    max_len_b: int = 200
    seed: int = 1

    def __post_init__(self) -> None:
        """BadFlag for values of other types, and for those that leave nothing to choose from."""
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind in NUMBERS and not is_number(kind, value):
                raise BadFlag("--" + field.name.replace("_", "-"), repr(value)[:80], NUMBERS[kind])
        if self.max_len_b < 0:
            raise BadFlag("--max-len-b", self.max_len_b, "an integer of at least 0")
        if not self.temperature > 0 or math.isinf(self.temperature):
            remedy = "for the likeliest token, leave out " + ("--sampling" if self.sampling else "--temperature")
            raise BadFlag("--temperature", self.temperature, "a positive number", remedy)
        if self.sampling_topk == 0 or self.sampling_topk < -1:
            raise BadFlag("--sampling-topk", self.sampling_topk, "at least 1, or -1 for all tokens")
        if self.sampling_topp != -1 and not 0 < self.sampling_topp <= 1:
            raise BadFlag("--sampling-topp", self.sampling_topp, "a probability above 0, or -1 for all tokens")
        given = {"--sampling-topk": self.sampling_topk, "--sampling-topp": self.sampling_topp}
        for flag, value in given.items():
            if value != -1 and not self.sampling:
                raise BadFlag(flag, f"{value} without --sampling", "--sampling beside it", "add it")

    def limit(self, prompt: int) -> int:
        """Largest number of new tokens after a prompt of so many."""
        return int(self.max_len_a * prompt) + self.max_len_b


@dataclass(frozen=True)
class Symbols:
    """Token ids with a meaning: ends of a text, padding (-1: none), and the unknown word (-1: none)."""

    ends: tuple[int, ...]
    pad: int = -1
    unk: int = -1


def allowed(log_probs: Tensor, words: Tensor, new: int, settings: ChoiceSettings, symbols: Symbols) -> Tensor:
    """log_probs (B, V) with minus infinity for tokens that may not follow words (B, T), of which `new` are new."""
    changed = log_probs.clone()
    if symbols.pad >= 0:
        changed[:, symbols.pad] = -math.inf
    if symbols.unk >= 0 and settings.unkpen:
        changed[:, symbols.unk] -= settings.unkpen
    if new + 1 < settings.min_len:
        changed[:, list(symbols.ends)] = -math.inf
    size = settings.no_repeat_ngram_size
    if 0 < size <= words.shape[1]:
        sequences = words.unfold(1, size, 1)  # (B, n, size)
        last = words[:, words.shape[1] - size + 1 :]
        row, place = (sequences[..., :-1] == last[:, None]).all(2).nonzero(as_tuple=True)
        changed[row, sequences[row, place, -1]] = -math.inf
    return changed


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, V) divided by a temperature, as log-probabilities again: the same as dividing logits."""
    return log_probs if temperature == 1 else (log_probs / temperature).log_softmax(-1)


def choose(log_probs: Tensor, settings: ChoiceSettings, random: Tensor | None) -> Tensor:
    """Tokens (B,): the likeliest of log_probs (B, V), or with numbers `random` (B,) float64 in [0, 1) drawn ones."""
    if random is None:
        return log_probs.argmax(1)
    probabilities = (log_probs.double() / settings.temperature).softmax(1)
    tokens: Tensor | None = None
    if settings.sampling_topk > 0 or settings.sampling_topp > 0:
        count = min(settings.sampling_topk, log_probs.shape[1]) if settings.sampling_topk > 0 else log_probs.shape[1]
        probabilities, tokens = probabilities.topk(count, 1)
        if settings.sampling_topp > 0:
            before = probabilities.cumsum(1) - probabilities
            probabilities = probabilities.masked_fill(before >= settings.sampling_topp, 0)
    sums = probabilities.cumsum(1)
    place = torch.searchsorted(sums, random[:, None].to(sums) * sums[:, -1:], right=True)
    possible = (probabilities > 0).long().cumsum(1).argmax(1, keepdim=True)  # the last one; rounding may pass it
    place = torch.minimum(place, possible)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]


def random_numbers(seed: int, prompts: Sequence[int], samples: Sequence[int], position: int) -> Tensor:
    """(B,) float64 in [0, 1): one for each hypothesis, which depends on nothing but these numbers, so that a text does
    not depend on what is written beside it, or how far ahead."""
    mask = (1 << 64) - 1
    drawn = [
        np.random.Generator(np.random.Philox(key=seed & mask, counter=[0, position, sample, prompt])).random()
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.float64)
