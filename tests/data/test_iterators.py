"""Epochs: order, shards, groups, and saving and restoring the place in both formats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data import CountingIterator, EpochBatchIterator, GroupedIterator, ShardedIterator
from fairseq.data.data_utils import numpy_seed


class Numbers(list):
    """A dataset whose items are their indices; notes what is prefetched."""

    def __init__(self, n, prefetching=False):
        super().__init__(range(n))
        self.supports_prefetch = prefetching
        self.prefetched, self.epochs = [], []

    def prefetch(self, indices):
        self.prefetched.append(list(indices))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


BATCHES = [[2 * i, 2 * i + 1] for i in range(7)]


def make(prefetching=False, **options):
    return EpochBatchIterator(Numbers(14, prefetching), list, BATCHES, **options)


def shuffled(seed):
    batches = [list(batch) for batch in BATCHES]
    with numpy_seed(seed):
        np.random.shuffle(batches)
    return batches


def test_counting():
    counted = CountingIterator([5, 6, 7, 8])
    assert (len(counted), next(counted), counted.count) == (4, 5, 1)
    assert next(counted.skip(1)) == 7
    assert counted.has_next()
    assert list(counted) == [8]
    assert not counted.has_next()
    resumed = CountingIterator([7, 8], start=2)
    assert (len(resumed), resumed.count, list(resumed)) == (4, 2, [7, 8])


def test_take():
    counted = CountingIterator(range(5))
    counted.take(2)
    assert (len(counted), list(counted), counted.has_next()) == (2, [0, 1], False)


@given(n=st.integers(0, 12), skip=st.integers(0, 12), size=st.integers(1, 5))
def test_groups(n, skip, size):
    source = CountingIterator(range(n)).skip(min(n, skip))
    done = source.count
    grouped = GroupedIterator(source, size)
    groups = list(grouped)
    assert groups == [list(range(i, min(i + size, n))) for i in range(done, n, size)]
    assert len(grouped) == -(-done // size) + len(groups) == grouped.count
    assert not grouped.has_next()


def test_groups_of_a_list():
    assert list(GroupedIterator([1, 2, 3], 2)) == [[1, 2], [3]]


def test_shards_have_equal_length():
    assert [list(ShardedIterator(range(5), 3, k, fill_value=-1)) for k in range(3)] == [[0, 3], [1, 4], [2, -1]]
    with pytest.raises(ValueError, match="shard 3"):
        ShardedIterator(range(5), 3, 3)


def test_each_epoch_is_a_shuffle_under_seed_plus_epoch():
    itr = make(seed=10)
    assert (itr.epoch, itr.next_epoch_idx, itr.iterations_in_epoch) == (0, 1, 0)
    assert list(itr.next_epoch_itr()) == shuffled(11)
    assert itr.end_of_epoch()
    assert list(itr.next_epoch_itr()) == shuffled(12)
    assert list(itr.next_epoch_itr(shuffle=False)) == BATCHES
    assert itr.epoch == 3
    assert itr.dataset.epochs == [1, 2, 3]


def test_shards_deal_out_the_shuffled_batches():
    shards = [list(make(num_shards=3, shard_id=k).next_epoch_itr()) for k in range(3)]
    assert [shards[i % 3][i // 3] for i in range(7)] == shuffled(2)
    assert [len(shard) for shard in shards] == [3, 3, 3]
    assert shards[1][2] == shards[2][2] == []
    assert len(make(num_shards=3)) == 3


def test_prefetching_and_batches_fixed_to_shards():
    itr = make(prefetching=True, num_shards=2, shard_id=1)
    own = BATCHES[1::2] + [[]]
    first, second = (list(itr.next_epoch_itr(fix_batches_to_gpus=True)) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(own)
    with numpy_seed(1 + 1 + 1):
        np.random.shuffle(own)
    assert first == own
    assert first != second
    assert itr.dataset.prefetched == [[2, 3, 6, 7, 10, 11]] * 2


@pytest.mark.parametrize("consumed", range(8))
def test_resuming(consumed):
    itr = make()
    list(itr.next_epoch_itr())
    epoch = itr.next_epoch_itr()
    seen = [next(epoch) for _ in range(consumed)]
    state = itr.state_dict()
    assert state == {"epoch": 2, "iterations_in_epoch": consumed, "shuffle": True}
    again = make()
    again.load_state_dict(state)
    assert again.iterations_in_epoch == consumed
    rest = again.next_epoch_itr()
    if consumed == 7:
        assert (again.epoch, list(rest)) == (3, shuffled(4))
    else:
        assert rest.count == consumed
        assert again.epoch == 2
        assert seen + list(rest) == shuffled(3)
        assert again.iterations_in_epoch == 7


def test_later_state_format():
    finished = make()
    finished.load_state_dict({"version": 2, "epoch": 3, "iterations_in_epoch": 0, "shuffle": True})
    assert list(finished.next_epoch_itr()) == shuffled(4)
    assert finished.epoch == 3
    halfway = make()
    halfway.load_state_dict({"version": 2, "epoch": 3, "iterations_in_epoch": 5, "shuffle": True})
    assert list(halfway.next_epoch_itr()) == shuffled(4)[5:]


def test_a_finished_epoch_survives_a_second_save():
    itr = make()
    itr.load_state_dict({"epoch": 2, "iterations_in_epoch": 7, "shuffle": False})
    assert itr.state_dict() == {"epoch": 2, "iterations_in_epoch": 7, "shuffle": False}
    assert itr.next_epoch_idx == 3


def test_unshuffled_resume_keeps_the_order():
    itr = make()
    itr.load_state_dict({"epoch": 1, "iterations_in_epoch": 2, "shuffle": False})
    assert list(itr.next_epoch_itr()) == BATCHES[2:]


def test_loader_processes_give_the_same_batches():
    assert list(make(num_workers=1).next_epoch_itr()) == shuffled(2)
