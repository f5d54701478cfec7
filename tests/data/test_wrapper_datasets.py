"""The small public wrappers."""

import numpy as np
import pytest
import torch

from fairseq.data import (
    AppendTokenDataset,
    BaseWrapperDataset,
    ConcatDataset,
    FairseqDataset,
    IdDataset,
    LeftPadDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    PrependTokenDataset,
    RandomCropDataset,
    RightPadDataset,
    SortDataset,
    StripTokenDataset,
    TruncateDataset,
    maybe_shorten_dataset,
)


class Items(FairseqDataset):
    def __init__(self, *items):
        self.items = [torch.tensor(item) for item in items]
        self.sizes = np.array([len(item) for item in items])
        self.epoch = 0

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)

    def num_tokens(self, index):
        return len(self.items[index])

    size = num_tokens

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.fixture
def items():
    return Items([4, 5, 2], [6, 2])


def test_padding(items):
    assert RightPadDataset(items, 1).collater(list(items.items)).tolist() == [[4, 5, 2], [6, 2, 1]]
    assert LeftPadDataset(items, 1).collater(list(items.items)).tolist() == [[4, 5, 2], [1, 6, 2]]


def test_added_tokens_count(items):
    longer = AppendTokenDataset(PrependTokenDataset(items, 0), 9)
    assert longer[1].tolist() == [0, 6, 2, 9]
    assert longer.sizes.tolist() == [5, 4]
    assert (longer.num_tokens(0), longer.size(1)) == (5, 4)
    same = PrependTokenDataset(AppendTokenDataset(items))
    assert same[0].tolist() == [4, 5, 2]
    assert same.sizes.tolist() == [3, 2]


def test_stripping():
    stripped = StripTokenDataset(Items([2, 2, 4, 2, 5, 2], [2]), 2)
    assert stripped[0].tolist() == [4, 2, 5]
    assert stripped[1].tolist() == []


def test_shortening(items):
    cut = TruncateDataset(items, 2)
    assert [cut[i].tolist() for i in range(2)] == [[4, 5], [6, 2]]
    assert (cut.sizes.tolist(), cut.num_tokens(0), cut.size(0)) == ([2, 2], 2, 2)
    crop = RandomCropDataset(Items(list(range(50))), 3)
    crops = []
    for epoch in range(1, 6):
        crop.set_epoch(epoch)
        crops.append(crop[0].tolist())
        assert crop[0].tolist() == crops[-1]
        assert np.diff(crops[-1]).tolist() == [1, 1]
    assert len({tuple(c) for c in crops}) > 1
    assert crop.dataset.epoch == 5
    assert type(maybe_shorten_dataset(items, "train", "", "truncate", 2, 1)) is TruncateDataset
    assert type(maybe_shorten_dataset(items, "train", "train,valid", "random_crop", 2, 1)) is RandomCropDataset
    assert maybe_shorten_dataset(items, "test", "train,valid", "truncate", 2, 1) is items
    assert maybe_shorten_dataset(items, "test", "", "none", 2, 1) is items


def test_sorting(items):
    data = Items([1], [1], [1], [1])
    assert SortDataset(data, [np.array([1, 0, 1, 0]), np.array([0, 9, 1, 3])]).ordered_indices().tolist() == [
        3,
        1,
        0,
        2,
    ]
    assert SortDataset(items, items.sizes).ordered_indices().tolist() == [1, 0]
    with pytest.raises(ValueError, match="2 items"):
        SortDataset(items, np.arange(3))


def test_nested_dictionary(items):
    nested = NestedDictionaryDataset(
        {
            "id": IdDataset(),
            "net_input": {"src_tokens": RightPadDataset(items, 1), "src_lengths": NumelDataset(items)},
            "nsentences": NumSamplesDataset(),
            "ntokens": NumelDataset(items, reduce=True),
        },
        sizes=[items.sizes],
    )
    assert len(nested) == 2
    batch = nested.collater([nested[1], nested[0]])
    assert batch["id"].tolist() == [1, 0]
    assert batch["net_input"]["src_tokens"].tolist() == [[6, 2, 1], [4, 5, 2]]
    assert batch["net_input"]["src_lengths"].tolist() == [2, 3]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 5)
    assert (nested.size(0), nested.num_tokens(1), nested.sizes.tolist()) == (3, 2, [3, 2])
    assert nested.collater([]) == {}
    with pytest.raises(ValueError, match="different lengths"):
        NestedDictionaryDataset({"a": items, "b": Items([1])})


def test_concatenation_with_ratios(items):
    both = ConcatDataset([items, Items([7])], sample_ratios=[2, 1])
    assert [both[i].tolist() for i in range(len(both))] == [[4, 5, 2], [6, 2], [4, 5, 2], [6, 2], [7]]
    assert both[-1].tolist() == [7]
    assert both.sizes.tolist() == [3, 2, 3, 2, 1]
    assert (both.num_tokens(4), both.size(3)) == (1, 2)
    assert not both.contiguous
    with pytest.raises(IndexError):
        both[5]
    both.set_epoch(3)
    assert items.epoch == 3
    with pytest.raises(ValueError, match="at least one"):
        ConcatDataset([])


def test_wrapper_passes_everything_on(items):
    wrapped = BaseWrapperDataset(items)
    assert (len(wrapped), wrapped[1].tolist(), wrapped.size(0), wrapped.num_tokens(1)) == (2, [6, 2], 3, 2)
    assert wrapped.ordered_indices().tolist() == [0, 1]
    assert not wrapped.supports_prefetch
    wrapped.set_epoch(4)
    assert wrapped.attr("epoch", 0) == 4


def test_an_abstract_method_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="FairseqDataset must define __getitem__"):
        FairseqDataset()[0]
