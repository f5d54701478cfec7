"""Counting votes, compiled and with tensors, against the definition computed one candidate at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fairseq.retrieval import kernels
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.kernels.vote_kernels import exp_of_negative
from fairseq.retrieval.voting import NO_MATCH, NOT_FOUND, Searched, count_votes

TEMPERATURES = (1.0, 7.5)


@pytest.fixture(params=["compiled", "tensors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled" and not kernels.AVAILABLE:
        pytest.skip("needs numba")
    monkeypatch.setattr(kernels, "AVAILABLE", request.param == "compiled")
    return str(request.param)


def plain(candidates: list[tuple[float, int, float]], target: int, temperature: float) -> float:
    """log p_kNN by the formula, from (score, value, weight) of each candidate."""
    if not candidates:
        return -math.inf
    peak = max(score for score, _, _ in candidates)
    terms = [(value, weight * math.exp((score - peak) / temperature)) for score, value, weight in candidates]
    mass = sum(term for value, term in terms if value == target)
    return max(NO_MATCH, math.log(mass) - math.log(sum(term for _, term in terms))) if mass else NO_MATCH


@pytest.mark.parametrize("weighted", ["none", "given", "found", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_votes_are_those_of_the_formula(way: str, seed: int, weighted: str) -> None:
    rng = np.random.default_rng(seed)
    rows, k, size = 9, 5, 40
    values = torch.from_numpy(rng.integers(0, 3, size))
    targets = torch.from_numpy(rng.integers(0, 4, rows))  # 3 is nobody's value
    asked = torch.from_numpy(np.flatnonzero(rng.random(rows) < 0.5))
    ids = torch.from_numpy(rng.integers(-1, size, (len(asked), k)))
    votes = rng.random((len(asked), k), np.float32) * 9 if weighted in ("found", "both") else None
    found_weights = None if votes is None else torch.from_numpy(votes)
    searched = Searched(asked, ids, torch.from_numpy(-rng.random((len(asked), k), np.float32) * 30), found_weights)
    given_rows = torch.from_numpy(np.sort(rng.integers(0, rows - 1, 30)))  # the last row is given nothing
    weights = torch.from_numpy(rng.random(30, np.float32) * 9) if weighted in ("given", "both") else None
    scores = torch.from_numpy(-rng.random(30, np.float32) * 30)
    given = Entries(given_rows, torch.from_numpy(rng.integers(0, size, 30)), scores, weights)
    inverse = 1 / torch.tensor(TEMPERATURES)

    outcome = count_votes(searched, given, values, targets, inverse)

    matched = []
    for row in range(rows):
        place = {int(r): n for n, r in enumerate(asked)}.get(row)
        found = []
        if place is not None:
            weight = [1.0] * k if votes is None else votes[place].tolist()
            found = list(zip(searched.scores[place].tolist(), ids[place].tolist(), weight))
        offered = [
            (float(scores[i]), int(given.ids[i]), 1.0 if weights is None else float(weights[i]))
            for i in range(30)
            if given_rows[i] == row
        ]
        candidates = [(score, int(values[entry]), weight) for score, entry, weight in found + offered]
        expected = [plain(candidates, int(targets[row]), temperature) for temperature in TEMPERATURES]
        np.testing.assert_allclose(outcome.log_probs[row], expected, rtol=1e-5, atol=1e-5)
        assert int(outcome.candidates[row]) == len(candidates)
        of_row = [(row, entry, score) for score, entry, _ in found + offered if values[entry] == targets[row]]
        assert int(outcome.matches[row]) == len(of_row)
        matched += of_row
    assert outcome.matched.scores is not None
    lists = (outcome.matched.rows.tolist(), outcome.matched.ids.tolist(), outcome.matched.scores.tolist())
    assert list(zip(*lists, strict=True)) == matched


def test_a_match_that_is_far_behind_still_counts(way: str) -> None:
    """exp(-500) is no float32, its logarithm is."""
    nothing = torch.zeros(0, dtype=torch.int64)
    searched = Searched(torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor([[-1.0, -501.0]]))
    given = Entries(nothing, nothing, torch.zeros(0))
    outcome = count_votes(searched, given, torch.tensor([7, 8]), torch.tensor([8]), torch.ones(1))
    assert outcome.log_probs.item() == pytest.approx(-500)


def test_a_score_that_is_no_number_is_not_hidden(way: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    searched = Searched(torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor([[-1.0, math.nan]]))
    given = Entries(nothing, nothing, torch.zeros(0))
    for target in (7, 9):
        outcome = count_votes(searched, given, torch.tensor([7, 8]), torch.tensor([target]), torch.ones(1))
        assert math.isnan(outcome.log_probs.item())


@pytest.mark.skipif(not kernels.AVAILABLE, reason="needs numba")
def test_exponentials_are_exact_to_single_precision() -> None:
    for x in [0.0, -0.0, *np.linspace(-87, 0, 2001), -1e-30]:
        assert exp_of_negative(np.float32(x)) == pytest.approx(math.exp(np.float32(x)), rel=2e-7)
    assert exp_of_negative(np.float32(-88)) == exp_of_negative(np.float32(-np.inf)) == 0
    assert math.isnan(exp_of_negative(np.float32(np.nan)))


@pytest.mark.parametrize("low", [NOT_FOUND, -1e30])
def test_entries_that_were_not_found_never_vote(way: str, low: float) -> None:
    """They have the last entry's value; where there are no others, the target has no probability."""
    values = torch.tensor([1, 2, 3])
    inverse = 1 / torch.tensor(TEMPERATURES)
    ids = torch.tensor([[0, -1, -1], [-1, -1, -1]])
    searched = Searched(torch.arange(2), ids, torch.tensor([[-2.0, low, low], [low, low, low]]))
    none = Entries(*(torch.zeros(0, dtype=kind) for kind in (torch.int64, torch.int64, torch.float32)))
    for target, first in ((1, 0.0), (3, NO_MATCH)):
        outcome = count_votes(searched, none, values, torch.full((2,), target), inverse)
        assert outcome.log_probs.tolist() == [[first] * 2, [NO_MATCH] * 2]
    given = Entries(torch.tensor([1]), torch.tensor([1]), torch.tensor([-50.0]))
    outcome = count_votes(searched, given, values, torch.tensor([3, 2]), inverse)
    assert outcome.log_probs.tolist() == [[NO_MATCH] * 2, [0.0] * 2]
