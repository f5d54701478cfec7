"""Choosing a token: the likeliest, or drawn ones with the right frequencies, of what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fairseq.errors import BadFlag
from fairseq.generation.choice import ChoiceSettings, Symbols, allowed, choose, random_numbers

PROBABILITIES = torch.tensor([0.4, 0.05, 0.25, 0.3])
NO_WORDS = torch.zeros(1, 0, dtype=torch.int64)


def frequencies(count: int = 20000, **settings: Any) -> np.ndarray:
    numbers = random_numbers(5, range(count), [0] * count, 3)
    log_probs = PROBABILITIES.log().expand(count, 4)
    return np.bincount(choose(log_probs, ChoiceSettings(sampling=True, **settings), numbers).numpy(), minlength=4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.05, 0.25, 0.3]),
        ({"temperature": 0.5}, np.array([0.16, 0.0025, 0.0625, 0.09]) / 0.315),
        ({"sampling_topk": 2}, [4 / 7, 0, 0, 3 / 7]),
        ({"sampling_topp": 0.8}, np.array([0.4, 0, 0.25, 0.3]) / 0.95),
        ({"sampling_topp": 0.7}, [4 / 7, 0, 0, 3 / 7]),
        ({"sampling_topk": 3, "sampling_topp": 0.1}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_distribution(settings: Any, expected: Any) -> None:
    counts, expected = frequencies(**settings), np.asarray(expected)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], expected[possible] / expected.sum() * counts.sum()).pvalue > 1e-3


def test_the_last_possible_token_is_drawn_at_the_edge() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(log_probs, ChoiceSettings(sampling=True), almost_one).tolist() == [1]
    assert choose(log_probs, ChoiceSettings(sampling=True), torch.zeros(1, dtype=torch.float64)).tolist() == [0]


def test_the_likeliest() -> None:
    assert choose(PROBABILITIES.log()[None], ChoiceSettings(), None).tolist() == [0]


def test_what_is_allowed() -> None:
    log_probs, symbols = PROBABILITIES.log()[None], Symbols((0,), pad=1, unk=3)
    changed = allowed(log_probs, NO_WORDS, 0, ChoiceSettings(min_len=2, unkpen=1.0), symbols)[0]
    assert changed.tolist() == pytest.approx([-math.inf, -math.inf, math.log(0.25), math.log(0.3) - 1])
    changed = allowed(log_probs, NO_WORDS, 1, ChoiceSettings(min_len=2), Symbols((0,)))[0]
    assert torch.equal(changed, log_probs[0])


@pytest.mark.parametrize(("size", "banned"), [(1, {2, 3}), (2, {2}), (3, set()), (9, set())])
def test_no_sequence_occurs_twice(size: int, banned: set[int]) -> None:
    """After 3 2 3, with pairs forbidden, 2 would make the pair 3 2 again."""
    words = torch.tensor([[3, 2, 3]])
    changed = allowed(PROBABILITIES.log()[None], words, 3, ChoiceSettings(no_repeat_ngram_size=size), Symbols(()))
    assert set(changed[0].isinf().nonzero().flatten().tolist()) == banned


def test_numbers_depend_on_prompt_sample_and_position_only() -> None:
    one = random_numbers(1, [4, 5], [0, 1], 9)
    assert torch.equal(one.flip(0), random_numbers(1, [5, 4], [1, 0], 9))
    given = ((2, [4], [0], 9), (1, [5], [0], 9), (1, [4], [1], 9), (1, [4], [0], 8))
    others = [random_numbers(*one_of) for one_of in given]
    assert len({float(number) for number in [one[0], *others]}) == 5


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--temperature", {"temperature": 0.0, "sampling": True}),
        ("--temperature", {"temperature": -1.0}),
        ("--temperature", {"temperature": math.inf}),
        ("--sampling-topk", {"sampling_topk": 0, "sampling": True}),
        ("--sampling-topp", {"sampling_topp": 0.0, "sampling": True}),
        ("--sampling-topp", {"sampling_topp": 1.5, "sampling": True}),
        ("--sampling-topk", {"sampling_topk": 5}),
        ("--sampling-topp", {"sampling_topp": 0.5}),
    ],
)
def test_settings_that_leave_no_choice(flag: str, settings: Any) -> None:
    with pytest.raises(BadFlag, match=flag):
        ChoiceSettings(**settings)
