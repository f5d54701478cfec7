"""Shares of saved searches: the figure as it was always printed, and the true one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.evaluation.saved_searches import SavedSearches, count_saved


def count(*patterns: str) -> SavedSearches:
    return count_saved(np.array([step == "S" for step in pattern], bool) for pattern in patterns)


@pytest.mark.parametrize(
    ("patterns", "printed", "true"),
    [
        (["S...."], 0.0, 0.8),
        (["S....S..."], 2 / 3, 7 / 9),
        (["SSSS"], 0.0, 0.0),
        (["S....", "S....S..."], 4 / 7, 11 / 14),
        (["S.S.S"], 0.4, 0.4),
        (["S", "", "S.S"], 0.25, 0.25),
    ],
)
def test_patterns(patterns: list[str], printed: float, true: float) -> None:
    saved = count(*patterns)
    assert saved.printed_share == pytest.approx(printed)
    assert saved.true_share == pytest.approx(true)


def test_never_searched() -> None:
    saved = count("....")
    assert math.isnan(saved.printed_share)
    assert saved.true_share == 1
    assert math.isnan(count().true_share)


@given(st.lists(st.lists(st.booleans(), max_size=30), max_size=5))
def test_against_the_published_procedure(samples: list[list[bool]]) -> None:
    """A list of idle runs, one per search, from all samples; the share is 1 - 1 / (1 + mean)."""
    runs = []
    for sample in samples:
        idle = 0
        for searched in sample:
            if searched:
                runs.append(idle)
                idle = 0
            else:
                idle += 1
    saved = count_saved(np.array(sample, bool) for sample in samples)
    if not runs:
        assert math.isnan(saved.printed_share)
        return
    assert saved.printed_share == pytest.approx(1 - 1 / (1 + np.mean(runs)), abs=1e-12)
    assert saved.printed_share <= saved.true_share + 1e-12
