"""Iterating over batches: a counting iterator that can be resumed, grouping for gradient accumulation, sharding over
workers, and the epoch iterator that joins them. Shuffling, seeds and state formats follow fairseq 0.9."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data

from fairseq.data import data_utils
from fairseq.errors import UserError

SAMPLED = 64  # number of batches whose texts are part of the digest that identifies the batches


class CountingIterator:
    """Counts what was consumed: `count` starts at `start`. `total` is the length of the whole, `start` included."""

    def __init__(self, iterable: Any, start: int | None = None, total: int | None = None) -> None:
        self.iterable = iterable
        self.count = getattr(iterable, "count", 0) if start is None else start
        if callable(self.count):  # a plain list has a method of that name
            self.count = 0
        self.total = self.count + len(iterable) if total is None else total
        self._source: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.count >= self.total:
            raise StopIteration
        if self._source is None:  # only now: opening a loader starts its workers
            self._source = iter(self.iterable)
        x = next(self._source)
        self.count += 1
        return x

    def has_next(self) -> bool:
        """Whether anything is left."""
        return self.count < len(self)

    def skip(self, num_to_skip: int) -> CountingIterator:
        """Consumes `num_to_skip` elements and returns itself."""
        next(itertools.islice(self, num_to_skip, num_to_skip), None)
        return self

    def take(self, n: int) -> None:
        """Stops after `n` elements in all."""
        self.total = min(self.total, n)


class GroupedIterator(CountingIterator):
    """Lists of `chunk_size` consecutive elements, the last one perhaps shorter: the micro-batches of one update."""

    def __init__(self, iterable: Any, chunk_size: int) -> None:
        consumed = getattr(iterable, "count", 0)
        consumed = 0 if callable(consumed) else consumed
        self.offset = math.ceil(consumed / chunk_size)
        self.chunk_size = chunk_size
        remaining = len(iterable) - consumed
        total = self.offset + math.ceil(remaining / chunk_size)
        super().__init__(_Groups(iterable, chunk_size), start=self.offset, total=total)


class _Groups:
    """Iterates over lists of `size` consecutive elements."""

    def __init__(self, iterable: Iterable[Any], size: int) -> None:
        self.iterable, self.size = iterable, size

    def __iter__(self) -> Iterator[list[Any]]:
        source = iter(self.iterable)
        while group := list(itertools.islice(source, self.size)):
            yield group


class ShardedIterator(CountingIterator):
    """Elements k, k + n, k + 2n, ... of an iterable; all shards have the same length, missing ones are `fill_value`."""

    def __init__(self, iterable: Any, num_shards: int, shard_id: int, fill_value: Any = None) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"shard {shard_id} is not between 0 and {num_shards - 1}")
        length = math.ceil(len(iterable) / num_shards)
        mine = itertools.islice(iterable, shard_id, len(iterable), num_shards)
        padded = itertools.islice(itertools.chain(mine, itertools.repeat(fill_value)), length)
        super().__init__(padded, start=0, total=length)


class _Batches:
    """A DataLoader's batches. A UserError in a worker process arrives with the worker's traceback in its message; here
    a UserError with the original sentence is raised."""

    def __init__(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.loader
        except (UserError, RuntimeError) as error:  # torch replaces exceptions with several arguments by RuntimeError
            sentence = re.search(r"^fairseq\.errors\.\w+: (.*)$", str(error), re.MULTILINE)
            if sentence is None:
                raise
            raise UserError(sentence[1]) from error


class EpochBatchIterator:
    """Iterates over the batches of one epoch after the other; its position can be saved and restored.

    `batch_sampler`: the batches as lists of indices. Epochs are numbered from 1; `epoch` is the last one started, 0
    before the first. Each epoch's order is a shuffle under the seed `seed + epoch`, then dealt out to the shards."""

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any],
        batch_sampler: Iterable[list[int]],
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 0,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.frozen_batches = tuple(batch_sampler)
        self.seed = seed
        self.num_shards, self.shard_id = num_shards, shard_id
        self.num_workers = num_workers
        self.epoch = epoch
        self.shuffle = True
        self._cur_epoch_itr: CountingIterator | None = None
        self._next_epoch_itr: CountingIterator | None = None
        self._consumed = 0  # of an epoch that was restored as finished
        self._supports_prefetch = getattr(dataset, "supports_prefetch", False)

    def __len__(self) -> int:
        return math.ceil(len(self.frozen_batches) / self.num_shards)

    @property
    def next_epoch_idx(self) -> int:
        """The epoch that `next_epoch_itr` will give."""
        return self.epoch if self._next_epoch_itr is not None else self.epoch + 1

    def next_epoch_itr(self, shuffle: bool = True, fix_batches_to_gpus: bool = False) -> CountingIterator:
        """Starts the next epoch, or continues the restored one.

        `shuffle=False` keeps the batches in the order given (`--curriculum`). `fix_batches_to_gpus` shuffles within
        each shard, so that a prefetching dataset loads the same items every epoch."""
        if self._next_epoch_itr is not None:
            self._cur_epoch_itr, self._next_epoch_itr = self._next_epoch_itr, None
        else:
            self.epoch += 1
            self._consumed = 0
            self._cur_epoch_itr = self._epoch_itr(self.epoch, shuffle, fix_batches_to_gpus)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        self.shuffle = shuffle
        return self._cur_epoch_itr

    def end_of_epoch(self) -> bool:
        """Whether the current epoch's batches are used up."""
        return self._cur_epoch_itr is None or not self._cur_epoch_itr.has_next()

    @property
    def iterations_in_epoch(self) -> int:
        """Batches (not updates) consumed in the current epoch."""
        if self._cur_epoch_itr is not None:
            return self._cur_epoch_itr.count
        return self._next_epoch_itr.count if self._next_epoch_itr is not None else self._consumed

    def state_dict(self) -> dict[str, Any]:
        """The position: current epoch and batches consumed in it (all of them at an epoch's end)."""
        return {"epoch": self.epoch, "iterations_in_epoch": self.iterations_in_epoch, "shuffle": self.shuffle}

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Identifies the batches to which a position belongs: their number in this shard, and a digest of their order
        and of the first texts of some of them."""
        batches = [np.asarray(batch, np.int64) for batch in self.frozen_batches]
        digest = hashlib.blake2b(f"{self.seed} {self.num_shards} {self.shard_id}".encode(), digest_size=16)
        digest.update(np.array([len(batch) for batch in batches], "<i8").tobytes())
        for batch in batches:
            digest.update(batch.astype("<i8").tobytes())
        for batch in batches[:: max(1, len(batches) // SAMPLED)]:
            item = self.dataset[int(batch[0])] if len(batch) else None
            source = item.get("source") if isinstance(item, dict) else None
            if isinstance(source, torch.Tensor):
                digest.update(source.numpy().astype("<i8").tobytes())
        return {"batches": len(self), "digest": digest.hexdigest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a position, in this format or in the later one (`version` 2: a finished epoch is `epoch + 1`, 0)."""
        self.epoch = state_dict["epoch"]
        offset = state_dict.get("iterations_in_epoch", 0)
        self.shuffle = state_dict.get("shuffle", True)
        self._cur_epoch_itr = self._next_epoch_itr = None
        self._consumed = 0
        if offset >= len(self) > 0:
            self._consumed = offset  # the epoch was finished: the next one starts afresh
        elif offset > 0:
            self._next_epoch_itr = self._epoch_itr(self.epoch, self.shuffle, offset=offset)
        elif self.epoch > 0:
            self.epoch -= 1  # nothing of this epoch was consumed: start it

    def _epoch_itr(
        self, epoch: int, shuffle: bool, fix_batches_to_gpus: bool = False, offset: int = 0
    ) -> CountingIterator:
        batches = list(self.frozen_batches)
        shuffle_late = shuffle and self._supports_prefetch and fix_batches_to_gpus
        if shuffle and not shuffle_late:
            self._shuffle(batches, self.seed + epoch)
        batches = list(ShardedIterator(batches, self.num_shards, self.shard_id, fill_value=[]))
        if self._supports_prefetch:
            self.dataset.prefetch([i for batch in batches for i in batch])
        if shuffle_late:
            self._shuffle(batches, self.seed + epoch + self.shard_id)
        loader = torch.utils.data.DataLoader(
            self.dataset,
            collate_fn=self.collate_fn,
            batch_sampler=batches[offset:],
            num_workers=self.num_workers,
        )
        return CountingIterator(_Batches(loader), start=offset)

    @staticmethod
    def _shuffle(batches: list[list[int]], seed: int) -> None:
        with data_utils.numpy_seed(seed):
            np.random.shuffle(batches)
