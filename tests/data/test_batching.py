"""Cutting ordered items into batches, filtering by length, padding, and numpy's seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data import FairseqDataset, data_utils
from fairseq.data.data_utils import batch_by_size, collate_tokens, filter_by_size, numpy_seed, post_process
from fairseq.errors import UserError

LENGTHS = [3, 3, 3, 4, 4]


def naive_batches(lengths, max_tokens, max_sentences, multiple):
    """fairseq 0.9's rule, with lists."""
    batches, batch = [], []
    for i, length in enumerate(lengths):
        longest = max([length] + [lengths[j] for j in batch])
        if batch and (len(batch) == max_sentences or (len(batch) + 1) * longest > max_tokens):
            k = max(multiple * (len(batch) // multiple), len(batch) % multiple)
            batches.append(batch[:k])
            batch = batch[k:]
        batch = [*batch, i]
    return batches + ([batch] if batch else [])


@pytest.mark.parametrize(
    "multiple, expected", [(1, [[0, 1, 2], [3, 4]]), (2, [[0, 1], [2, 3, 4]]), (8, [[0, 1, 2], [3, 4]])]
)
def test_published_examples(multiple, expected):
    assert batch_by_size(range(5), LENGTHS.__getitem__, 12, None, multiple) == expected
    assert batch_by_size(np.arange(5), np.array(LENGTHS), 12, required_batch_size_multiple=multiple) == expected


def test_published_example_by_count():
    assert batch_by_size(range(7), lambda i: 1, None, 4, 8) == [[0, 1, 2, 3], [4, 5, 6]]


@given(
    lengths=st.lists(st.integers(1, 12), max_size=40),
    max_tokens=st.one_of(st.none(), st.integers(12, 60)),
    max_sentences=st.one_of(st.none(), st.integers(1, 9)),
    multiple=st.integers(1, 9),
    ascending=st.booleans(),
)
def test_against_the_definition(lengths, max_tokens, max_sentences, multiple, ascending):
    lengths = sorted(lengths) if ascending else lengths
    batches = batch_by_size(range(len(lengths)), lengths.__getitem__, max_tokens, max_sentences, multiple)
    limit = float("inf")
    assert batches == naive_batches(lengths, max_tokens or limit, max_sentences or limit, multiple)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(len(batch) <= (max_sentences or limit) for batch in batches)
    if multiple == 1:
        assert all(len(batch) * max(lengths[i] for i in batch) <= (max_tokens or limit) for batch in batches)


def test_indices_are_kept_in_their_order():
    assert batch_by_size(np.array([7, 2, 5]), np.array([1, 1, 1]), 2) == [[7, 2], [5]]


def test_an_item_that_is_too_long_is_one_sentence():
    with pytest.raises(UserError, match="item 7 has 13 tokens, more than --max-tokens 12; raise --max-tokens"):
        batch_by_size([3, 7], lambda i: {3: 1, 7: 13}[i], 12)


class Sized(FairseqDataset):
    def __init__(self, sizes, with_array=True):
        self.all = sizes
        if with_array:
            self.sizes = np.array(sizes)

    def __len__(self):
        return len(self.all)

    def num_tokens(self, index):
        return self.all[index]

    def size(self, index):
        return self.all[index]


@pytest.mark.parametrize("with_array", [True, False])
@pytest.mark.parametrize("limit", [5, (5,)])
def test_filter_by_size(caplog, with_array, limit):
    dataset = Sized([3, 9, 5, 6, 1], with_array)
    assert filter_by_size(np.array([4, 3, 2, 1]), dataset, limit).tolist() == [4, 2]
    assert "2 samples have invalid sizes and will be skipped" in caplog.text
    assert "[3, 1]" in caplog.text
    with pytest.raises(UserError, match="item 3 has length 6.*--skip-invalid-size-inputs-valid-test"):
        filter_by_size(np.array([4, 3, 2, 1]), dataset, limit, raise_exception=True)
    assert filter_by_size(np.arange(5), dataset, None).tolist() == [0, 1, 2, 3, 4]
    assert filter_by_size(np.array([], dtype=int), dataset, limit).tolist() == []


def test_filter_by_several_sizes():
    dataset = Sized([(3, 4), (9, 1), (2, 8)], with_array=False)
    assert filter_by_size(np.arange(3), dataset, (5, 5)).tolist() == [0]
    assert filter_by_size(np.arange(3), dataset, (None, 5)).tolist() == [0, 1]
    assert filter_by_size(np.arange(3), dataset, 8).tolist() == [0, 2]
    named = Sized([{"a": 3, "b": 9}, {"a": 7, "b": 1}], with_array=False)
    assert filter_by_size(np.arange(2), named, {"a": 5}).tolist() == [0]


def test_dataset_batches_itself():
    dataset = Sized(LENGTHS)
    assert dataset.batch_by_size(dataset.ordered_indices(), max_tokens=12) == [[0, 1, 2], [3, 4]]


def test_collate_tokens():
    values = [torch.tensor([4, 2]), torch.tensor([5, 6, 2])]
    assert collate_tokens(values, 1).tolist() == [[4, 2, 1], [5, 6, 2]]
    assert collate_tokens(values, 1, left_pad=True).tolist() == [[1, 4, 2], [5, 6, 2]]
    moved = collate_tokens(values, 1, eos_idx=2, move_eos_to_beginning=True)
    assert moved.tolist() == [[2, 4, 1], [2, 5, 6]]
    with pytest.raises(ValueError, match="ends in 6, expected end-of-sentence"):
        collate_tokens([torch.tensor([5, 6])], 1, eos_idx=2, move_eos_to_beginning=True)


def test_numpy_seed_is_undone():
    np.random.seed(0)
    expected = np.random.rand(2)
    np.random.seed(0)
    first = np.random.rand()
    with numpy_seed(1, 2):
        inner = np.random.rand()
    assert [first, np.random.rand()] == expected.tolist()
    with numpy_seed(int(hash((1, 2)) % 1e6)):
        assert np.random.rand() == inner
    with numpy_seed(None):
        pass


@pytest.mark.parametrize(
    "symbol, text, expected",
    [
        ("sentencepiece", "\u2581he llo \u2581w", "hello w"),
        ("@@ ", "he@@ llo w@@", "hello w"),
        ("subword_nmt", "he@@ llo", "hello"),
        ("_EOW", "he llo_EOW w_EOW", "hello w"),
        ("letter", "h i | w |", "hi w"),
        ("wordpiece", "_he llo _w", "hello w"),
        ("silence", "a <SIL> b", "a b"),
        (None, "a@@ b", "a@@ b"),
    ],
)
def test_post_process(symbol, text, expected):
    assert post_process(text, symbol) == expected


def test_infer_language_pair(tmp_path):
    (tmp_path / "dict.de.txt").touch()
    (tmp_path / "train.de-en.de.bin").touch()
    assert data_utils.infer_language_pair(str(tmp_path)) == ("de", "en")
