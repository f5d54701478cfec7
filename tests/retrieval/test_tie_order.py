"""Which rows have ties, and numpy's order of each row, against what is written row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.retrieval.entries import bounds_of
from fairseq.retrieval.tie_order import NEAR, original_order, rows_with_ties

pytestmark = pytest.mark.usefixtures("compiled_and_arrays")


def tied(rows: list[list[tuple[int, float]]], norms: list[float] | None = None) -> list[int]:
    """`rows_with_ties` of rows of (id, score)."""
    flat = [pair for row in rows for pair in row]
    ids = torch.tensor([pair[0] for pair in flat], dtype=torch.int64)
    scores = torch.tensor([pair[1] for pair in flat], dtype=torch.float32)
    bounds = bounds_of(torch.tensor([len(row) for row in rows]))
    return rows_with_ties(bounds, ids, scores, None if norms is None else torch.tensor(norms)).tolist()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], False),
        ([(3, -1.0)], False),
        ([(3, -1.0), (4, -1.0)], True),
        ([(3, -1.0), (3, -1.0)], False),  # copies of one entry: their order decides nothing
        ([(3, -1.0), (3, -1.0), (5, -1.0)], True),
        ([(3, -1.0), (4, -2.0), (3, -1.0)], False),
        ([(3, 0.0), (4, -0.0)], True),
        ([(-1, -3e38), (-1, -3e38), (0, -1.0)], False),
        ([(3, 1.0), (4, float(np.nextafter(np.float32(1), np.float32(2))))], False),
    ],
)
def test_equal_scores(row: list[tuple[int, float]], expected: bool) -> None:
    other = [(7, -5.0), (8, -6.0)]
    assert tied([other, row, other]) == [1] * expected
    assert tied([[], other, [], row]) == [3] * expected


@pytest.mark.parametrize("number", [1.0, -37.5, 1e-3, -2e4])
def test_nearly_equal_scores(number: float) -> None:
    """Somewhat apart counts where scores were computed in two ways, and only there."""
    reach = NEAR * (2 + abs(number))
    row = [(3, number), (9, number + 3e4), (4, number + 0.7 * reach)]
    far = [(3, number), (4, number + 3 * reach)]
    row = [row[0], row[2]]
    assert tied([row, far, row], [2.0, 2.0, -1.0]) == [0]
    assert tied([[(3, number), (3, number + 0.7 * reach)]], [2.0]) == []
    assert tied([[(3, number), (4, number - 0.7 * reach), (5, number + 9 * reach)]], [2.0]) == [0]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 300, 1500]), min_size=1, max_size=5),
    kinds=st.sampled_from([3, 10**4, 10**7]),
    own=st.booleans(),
)
def test_against_each_row_alone(seed: int, sizes: list[int], kinds: int, own: bool) -> None:
    """Rows with ties, and the order: `argsort()[::-1]` of the very row. own: an entry's score is its own alone."""
    rng = np.random.default_rng(seed)
    numbers = -rng.permutation(kinds)[:4000].astype(np.float32)
    rows = []
    for size in sizes:
        scores = rng.choice(numbers, size)
        rows.append((scores, (-scores).astype(np.int64) if own else rng.integers(0, 50, size)))
    pairs = [set(zip(*row, strict=True)) for row in rows]  # copies of an entry are one pair
    expected = [row for row, unlike in enumerate(pairs) if len(unlike) > len({score for score, _ in unlike})]
    scores, ids = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*rows, strict=True))
    counts = torch.tensor(sizes)
    assert rows_with_ties(bounds_of(counts), ids, scores).tolist() == expected
    starts = np.cumsum(sizes) - sizes
    order = np.concatenate([start + row[0].argsort()[::-1] for start, row in zip(starts, rows, strict=True)])
    np.testing.assert_array_equal(original_order(scores, counts), order)
