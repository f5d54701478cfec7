"""Blocks, shifted sources, samples and context windows, against definitions written one token at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data import (
    ConcatDataset,
    Dictionary,
    LMContextWindowDataset,
    MMapIndexedDataset,
    MonolingualDataset,
    TokenBlockDataset,
    TruncatedDictionary,
)
from fairseq.data.indexed_dataset import make_builder
from fairseq.data.token_block_dataset import block_bounds
from fairseq.errors import BadFlag, UserError

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30)
MODES = ["none", None, "eos", "complete", "complete_doc"]


def naive_blocks(sizes, block_size, mode, separator=1):
    """Lists of (item, position in item), one list per block."""
    tokens = [[(i, k) for k in range(size)] for i, size in enumerate(sizes)]
    if mode == "eos":
        return tokens
    if mode in (None, "none"):
        stream = sum(tokens, [])
        return [stream[i : i + block_size] for i in range(0, len(stream), block_size)]
    blocks, current = [], []
    for item in tokens:
        if mode == "complete_doc" and len(item) == separator:
            blocks.append(current)
            current = []
        elif not current or len(current) + len(item) <= block_size:
            current = current + item
        else:
            blocks.append(current)
            current = item
    smallest = 1 if mode == "complete" else 2
    return [block for block in [*blocks, current] if len(block) >= smallest]


def naive_source(blocks, tokens, pad=1, eos=2):
    """(source, past target) of each block, by looking back within the item in which the block begins."""
    result = []
    for block in blocks:
        values = [tokens[i][k] for i, k in block]
        item, offset = block[0]
        before = [pad, eos] + [tokens[item][k] for k in range(offset)]
        result.append(((before[-1:] + values)[: len(block)], (before[-2:] + values)[: len(block)]))
    return result


@settings(max_examples=300)
@given(sizes=SIZES, block_size=st.integers(1, 12), mode=st.sampled_from(MODES), separator=st.integers(0, 3))
def test_bounds_against_the_definition(sizes, block_size, mode, separator):
    bounds = block_bounds(np.array(sizes), block_size, mode, separator)
    blocks = naive_blocks(sizes, block_size, mode, separator)
    stream = np.concatenate(([0], np.cumsum(sizes)))
    expected = [(stream[b[0][0]] + b[0][1], stream[b[-1][0]] + b[-1][1] + 1) for b in blocks if b]
    assert [tuple(pair) for pair in bounds.tolist() if pair[0] < pair[1]] == expected
    assert len(bounds) == len(blocks)


def test_published_examples():
    def lengths(sizes, block_size, mode):
        bounds = block_bounds(np.array(sizes), block_size, mode)
        return (bounds[:, 1] - bounds[:, 0]).tolist()

    assert lengths([5, 4, 2], 3, "none") == [3, 3, 3, 2]
    assert lengths([5, 4, 2], 6, "complete") == [5, 6]
    assert lengths([4, 2, 1, 2], 3, "complete") == [4, 3, 2]
    assert lengths([4, 2, 1, 2], 9, "complete_doc") == [6, 2]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(items, flat): a dataset with these items, as one mapped file or as two concatenated legacy files."""

    def write(items, impl):
        prefix = str(tmp_path_factory.mktemp("blocks") / "x")
        builder = make_builder(prefix + ".bin", impl, 100)
        for item in items:
            builder.add_item(torch.tensor(item, dtype=torch.int64))
        builder.finalize(prefix + ".idx")
        from fairseq.data.data_utils import load_indexed_dataset

        return load_indexed_dataset(prefix)

    def make(items, kind):
        if kind == "mmap":
            return write(items, "mmap")
        half = len(items) // 2
        parts = [part for part in (items[:half], items[half:]) if part]
        return ConcatDataset([write(part, "mmap" if kind == "shards" else "lazy") for part in parts])

    return make


@settings(max_examples=60)
@given(
    sizes=SIZES,
    block_size=st.integers(1, 12),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(["mmap", "shards", "legacy"]),
)
def test_sources_against_the_definition(make, sizes, block_size, mode, kind):
    tokens, value = [], 10
    for size in sizes:
        tokens.append([*range(value, value + size)])
        value = 10 + (value + size) % 80
    dataset = make(tokens, kind)
    assert getattr(dataset, "contiguous", False) == (kind != "legacy")
    blocks = TokenBlockDataset(dataset, dataset.sizes, block_size, 1, 2, mode, include_targets=True)
    expected = naive_blocks(sizes, block_size, mode)
    assert len(blocks) == len(expected)
    assert blocks.sizes.tolist() == [len(block) for block in expected]
    shifted = naive_source([block for block in expected if block], tokens)
    got = [blocks[i] for i in range(len(blocks)) if len(expected[i])]
    assert [(source.tolist(), past.tolist()) for source, _, past in got] == shifted
    targets = [item.tolist() for _, item, _ in got]
    assert targets == [[tokens[i][k] for i, k in block] for block in expected if block]
    plain = TokenBlockDataset(dataset, dataset.sizes, block_size, 1, 2, mode)
    assert [plain[i].tolist() for i in range(len(plain)) if len(expected[i])] == targets


def test_published_shift(make):
    dataset = make([[4, 5, 2], [2], [4, 6, 2]], "mmap")
    blocks = TokenBlockDataset(dataset, dataset.sizes, 3, 1, 2, "none", include_targets=True)
    assert [item.tolist() for _, item, _ in blocks] == [[4, 5, 2], [2, 4, 6], [2]]
    assert [source.tolist() for source, _, _ in blocks] == [[2, 4, 5], [2, 2, 4], [6]]


def test_a_block_is_a_slice_of_the_map(make):
    dataset = make([[4, 5, 2], [2], [4, 6, 2]], "mmap")
    assert isinstance(dataset, MMapIndexedDataset)
    blocks = TokenBlockDataset(dataset, dataset.sizes, 4, 1, 2)
    dataset._sizes = dataset._pointers = None  # nothing but the flat tokens is needed any more
    assert blocks[1].tolist() == [4, 6, 2]


def test_bad_requests_are_one_sentence(make):
    dataset = make([[4, 2]], "mmap")
    with pytest.raises(BadFlag, match="--sample-break-mode: found lines"):
        TokenBlockDataset(dataset, dataset.sizes, 4, 1, 2, "lines")
    for block_size in (0, -3, None):
        with pytest.raises(BadFlag, match="--tokens-per-sample"):
            TokenBlockDataset(dataset, dataset.sizes, block_size, 1, 2, "complete")
    with pytest.raises(UserError, match="cannot be cut into blocks"):
        TokenBlockDataset([], [], 4, 1, 2)
    assert len(TokenBlockDataset(dataset, dataset.sizes, None, 1, 2, "eos")) == 1


def test_prefetch_reaches_the_items_under_the_blocks(make):
    items = [[4, 5, 2], [2], [4, 6, 2], [7, 2]]

    class Prefetching(list):
        supports_prefetch = True
        asked = None

        def prefetch(self, indices):
            self.asked = list(indices)

    dataset = Prefetching(torch.tensor(item) for item in items)
    blocks = TokenBlockDataset(dataset, [len(item) for item in items], 3, 1, 2, "none")
    monolingual = MonolingualDataset(blocks, blocks.sizes, Dictionary(), shuffle=True)
    assert monolingual.supports_prefetch
    monolingual.prefetch([2, 0])
    assert dataset.asked == [0, 2, 3]


def monolingual(make, items, block_size, mode="none", vocab=100, **options):
    dataset = make(items, "mmap")
    blocks = TokenBlockDataset(dataset, dataset.sizes, block_size, 1, 2, mode, include_targets=True)
    dictionary = Dictionary()
    for k in range(vocab - 4):
        dictionary.add_symbol(f"w{k}")
    options.setdefault("tgt_vocab", None)
    if isinstance(options["tgt_vocab"], int):
        options["tgt_vocab"] = TruncatedDictionary(dictionary, options["tgt_vocab"])
    add_eos = options.pop("add_eos_for_other_targets", False)
    return MonolingualDataset(blocks, blocks.sizes, dictionary, options.pop("tgt_vocab"), add_eos, **options)


def test_samples_and_batch(make):
    dataset = monolingual(make, [[4, 5, 2], [2], [4, 6, 2]], 3)
    assert {key: dataset[1][key] for key in ("id",)} == {"id": 1}
    batch = dataset.collater([dataset[1], dataset[2]])
    assert batch["id"].tolist() == [1, 2]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 4)
    assert batch["net_input"]["src_tokens"].tolist() == [[2, 2, 4], [6, 1, 1]]
    assert batch["net_input"]["src_lengths"].tolist() == [3, 1]
    assert batch["target"].tolist() == [[2, 4, 6], [2, 1, 1]]
    assert batch["target"].dtype == torch.int64
    assert dataset.collater([]) == {}


def test_bos_is_added_but_not_counted(make):
    dataset = monolingual(make, [[4, 5, 2]], 3, add_bos_token=True)
    assert dataset[0]["source"].tolist() == [0, 2, 4, 5]
    assert dataset[0]["target"].tolist() == [0, 4, 5, 2]
    assert dataset.num_tokens(0) == dataset.size(0) == 3


def test_targets_beyond_the_output_dictionary_are_unknown(make):
    dataset = monolingual(make, [[4, 5, 6, 2]], 4, tgt_vocab=5)
    assert dataset[0]["target"].tolist() == [4, 3, 3, 2]
    assert dataset[0]["source"].tolist() == [2, 4, 5, 6]


def test_other_targets(make):
    dataset = monolingual(make, [[4, 5, 2]], 3, targets=["self", "future", "past"], add_eos_for_other_targets=True)
    sample = dataset[0]
    assert sample["source"].tolist() == [2, 4, 5, 2]
    assert [t.tolist() for t in sample["target"]] == [[2, 4, 5, 2], [4, 5, 2, 1], [1, 2, 4, 5]]
    batch = dataset.collater([sample, sample])
    assert [t.shape for t in batch["target"]] == [(2, 4)] * 3
    plain = monolingual(make, [[4, 5, 2]], 3, targets=["past"])[0]
    assert (plain["source"].tolist(), plain["target"].tolist()) == ([2, 4, 5], [1, 2, 4])
    with pytest.raises(ValueError, match="targets"):
        monolingual(make, [[4, 2]], 3, targets=["next"])


def test_order_is_by_length_with_random_ties(make):
    items = [[4, 2], [4, 5, 2], [2], [5, 2], [6, 2]]
    plain = monolingual(make, items, 9, "eos")
    assert plain.ordered_indices().tolist() == [2, 0, 3, 4, 1]
    shuffled = monolingual(make, items, 9, "eos", shuffle=True)
    np.random.seed(5)
    got = shuffled.ordered_indices().tolist()
    np.random.seed(5)
    ties = np.random.permutation(5)
    assert got == [2, *sorted([0, 3, 4], key=lambda i: ties[i]), 1]
    assert shuffled.num_tokens_vec(np.array([1, 2])).tolist() == [3, 1]


def naive_context(batches, tokens_per_sample, context, pad=1):
    """The rule, with lists: yields (source, target, start) of each row."""
    previous = []
    for rows, targets in batches:
        width = len(rows[0])
        for row, target in zip(rows, targets):
            extra = len(previous) + sum(t != pad for t in row) - (tokens_per_sample + context)
            previous = previous[max(0, extra) :]
            start = len(previous)
            source = previous + row + [pad] * (context - start)
            shifted = [pad] * start + target + [pad] * (width + context - start - len(target))
            yield source, shifted, start
            previous = [t for t in source if t != pad][-context:]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    block_size=st.integers(1, 6),
    mode=st.sampled_from(["none", "eos", "complete"]),
    context=st.integers(1, 8),
    per_batch=st.integers(1, 3),
)
def test_context_window_against_the_definition(make, sizes, block_size, mode, context, per_batch):
    items = [[*range(10 * (i % 9) + 4, 10 * (i % 9) + 3 + size), 2] for i, size in enumerate(sizes)]
    inner = monolingual(make, items, block_size, mode)
    dataset = LMContextWindowDataset(monolingual(make, items, block_size, mode), block_size, context, 1)
    assert dataset.ordered_indices().tolist() == list(range(len(inner)))
    groups = [range(i, min(i + per_batch, len(inner))) for i in range(0, len(inner), per_batch)]
    plain = [inner.collater([inner[i] for i in group]) for group in groups]
    expected = list(
        naive_context(
            [(b["net_input"]["src_tokens"].tolist(), b["target"].tolist()) for b in plain], block_size, context
        )
    )
    got = []
    for group, before in zip(groups, plain):
        batch = dataset.collater([dataset[i] for i in group])
        source, lengths = batch["net_input"]["src_tokens"], batch["net_input"]["src_lengths"]
        got += list(zip(source.tolist(), batch["target"].tolist(), batch["start_indices"]))
        assert batch["ntokens"] == before["ntokens"]
        assert (lengths - before["net_input"]["src_lengths"]).tolist() == batch["start_indices"]
        assert source.shape[1] == before["target"].shape[1] + context
    assert got == expected


def test_published_context_example(make):
    dataset = LMContextWindowDataset(monolingual(make, [[10, 11, 12, 13, 14, 15, 16]], 3), 3, 2, 1)
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["net_input"]["src_tokens"].tolist() == [[2, 10, 11, 1, 1], [10, 11, 12, 13, 14]]
    assert batch["target"].tolist() == [[10, 11, 12, 1, 1], [1, 1, 13, 14, 15]]
    last = dataset.collater([dataset[2]])
    assert (batch["start_indices"], last["start_indices"]) == ([0, 2], [2])
    assert last["net_input"]["src_tokens"].tolist() == [[13, 14, 15]]
    assert last["target"].tolist() == [[1, 1, 16]]
    assert dataset.collater([]) == {}
    with pytest.raises(BadFlag, match="--context-window"):
        LMContextWindowDataset(dataset.dataset, 3, 0, 1)
