"""The bisection of --target-foss, with known shares."""

from __future__ import annotations

import pytest

from fairseq.evaluation.target_foss import bisect


@pytest.mark.parametrize(("target", "expected"), [(0.5, 200), (0.95, 20), (0.999, 1)])
def test_the_largest_number_that_saves_enough(target: float, expected: int) -> None:
    asked: list[int] = []

    def share(n: int) -> float:
        asked.append(n)
        return max(0.0, 1 - n / 400)

    assert bisect(share, target, 512) == pytest.approx(expected, abs=1)
    assert share(bisect(share, target, 512)) >= target or expected == 1
    assert len(asked) < 30


def test_nothing_to_save_searches_always() -> None:
    assert bisect(lambda n: max(0.0, 1 - n / 400), 0.0, 512) >= 400


def test_a_share_that_jumps() -> None:
    assert bisect(lambda n: 0.8 if n < 17 else 0.1, 0.5, 2048) == 16
