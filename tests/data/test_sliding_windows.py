"""Windows of a text, against the rules written as loops."""

import numpy as np
import pytest
import torch

from fairseq.data.sliding_windows import SlidingWindowDataset, rolling_bounds, window_bounds
from fairseq.errors import BadFlag


def by_loops(length, block, stride):
    """(begin, scored tokens) of each window, from the rule of the Hugging Face forks: labels are the last tokens."""
    for place in range(0, length, stride):
        begin, end = max(place + stride - block, 0), min(place + stride, length)
        scored = [token for token in range(place, end) if token > begin]  # a window's first token has no prediction
        if scored:
            yield begin, scored


@pytest.mark.parametrize("length, block, stride", [(20, 8, 4), (21, 8, 8), (5, 8, 4), (9, 8, 3), (1, 4, 2), (33, 2, 1)])
def test_windows(length, block, stride):
    found = window_bounds(np.array([length]), block, stride).tolist()
    assert [(begin, list(range(first, end))) for begin, first, end in found] == list(by_loops(length, block, stride))


def test_no_window_reaches_into_another_text():
    bounds = window_bounds(np.array([10, 0, 3, 9]), 4, 2)
    apart = [np.array(window_bounds(np.array([n]), 4, 2)) + offset for n, offset in ((10, 0), (3, 10), (9, 13))]
    np.testing.assert_array_equal(bounds, np.concatenate(apart))


def test_a_remainder_is_left_out_but_no_whole_text():
    assert window_bounds(np.array([10, 3]), 4, 4, drop_remainder=True)[:, 2].tolist() == [4, 8, 13]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_rolling_windows_score_every_token_once(length):
    bounds = rolling_bounds(np.array([3, length]), 8)[1:] - 3
    assert np.concatenate([np.arange(first, end) for _, first, end in bounds]).tolist() == list(range(length))
    assert bounds[0, 0] == -1
    assert all(end - begin - 1 == 8 for begin, _, end in bounds) or length < 8


class Flat:
    contiguous, sizes = True, np.array([4, 3])

    def token_range(self, start, end):
        return np.arange(100, 107)[start:end]


class Vocabulary:
    def __len__(self):
        return 200

    def pad(self):
        return -1

    def eos(self):
        return 9


def test_batches():
    windows = SlidingWindowDataset(Flat(), Vocabulary(), 4, 2)
    batch = windows.collater([windows[0], windows[1]])
    assert batch["net_input"]["src_tokens"].tolist() == [[100, -1, -1], [100, 101, 102]]
    assert batch["target"].tolist() == [[101, -1, -1], [-1, 102, 103]]
    assert batch["start_indices"] == [0, 1] and batch["ntokens"] == 3
    assert windows.dropped == 0 and windows.sizes.sum() == 6


def test_what_stands_before_a_rolling_text():
    windows = SlidingWindowDataset(Flat(), Vocabulary(), 3, group=1, rolling=True)
    sources = [windows[number]["source"].tolist() for number in range(len(windows))]
    assert sources == [[9, 100, 101], [100, 101, 102], [9, 104, 105]]
    assert [windows[number]["target"].tolist() for number in range(3)][1] == [101, 102, 103]
    assert [windows[number]["start"] for number in range(3)] == [0, 2, 0]
    assert torch.equal(torch.as_tensor(windows.sizes), torch.tensor([3, 1, 3]))


@pytest.mark.parametrize("block, stride", [(1, None), (4, 5)])
def test_windows_that_cannot_be(block, stride):
    with pytest.raises(BadFlag):
        SlidingWindowDataset(Flat(), Vocabulary(), block, stride)
