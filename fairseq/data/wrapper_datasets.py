"""Small datasets that change or describe the items of another one: padding into batches, tokens added, removed or cut
off, ids, counts, another order, and a nested dictionary of several datasets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data

from fairseq.data import data_utils
from fairseq.data.fairseq_dataset import BaseWrapperDataset, FairseqDataset


class PadDataset(BaseWrapperDataset):
    """Collates 1-D items into a matrix padded with `pad_idx` on the left or right."""

    def __init__(self, dataset: Any, pad_idx: int, left_pad: bool) -> None:
        super().__init__(dataset)
        self.pad_idx, self.left_pad = pad_idx, left_pad

    def collater(self, samples: list[torch.Tensor]) -> torch.Tensor:
        return data_utils.collate_tokens(samples, self.pad_idx, left_pad=self.left_pad)


class LeftPadDataset(PadDataset):
    """Pads on the left."""

    def __init__(self, dataset: Any, pad_idx: int) -> None:
        super().__init__(dataset, pad_idx, left_pad=True)


class RightPadDataset(PadDataset):
    """Pads on the right."""

    def __init__(self, dataset: Any, pad_idx: int) -> None:
        super().__init__(dataset, pad_idx, left_pad=False)


class _LongerDataset(BaseWrapperDataset):
    """Items with one token more; without a `token`, the same items."""

    def __init__(self, dataset: Any, token: int | None = None) -> None:
        super().__init__(dataset)
        self.token = token
        self._extra = 0 if token is None else 1

    @property
    def sizes(self) -> np.ndarray:
        return np.asarray(self.dataset.sizes) + self._extra

    def num_tokens(self, index: int) -> int:
        return self.dataset.num_tokens(index) + self._extra

    def size(self, index: int) -> int:
        return self.dataset.size(index) + self._extra


class PrependTokenDataset(_LongerDataset):
    """Puts `token` before each item."""

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.dataset[index]
        return item if self.token is None else torch.cat([item.new_tensor([self.token]), item])


class AppendTokenDataset(_LongerDataset):
    """Puts `token` after each item."""

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.dataset[index]
        return item if self.token is None else torch.cat([item, item.new_tensor([self.token])])


class StripTokenDataset(BaseWrapperDataset):
    """Removes `id_to_strip` from both ends of each item."""

    def __init__(self, dataset: Any, id_to_strip: int) -> None:
        super().__init__(dataset)
        self.id_to_strip = id_to_strip

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.dataset[index]
        kept = torch.nonzero(item != self.id_to_strip).flatten().tolist()
        return item[kept[0] : kept[-1] + 1] if kept else item[:0]


class TruncateDataset(BaseWrapperDataset):
    """The first `truncation_length` tokens of each item."""

    def __init__(self, dataset: Any, truncation_length: int) -> None:
        super().__init__(dataset)
        self.truncation_length = truncation_length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.dataset[index][: self.truncation_length]

    @property
    def sizes(self) -> np.ndarray:
        return np.minimum(self.dataset.sizes, self.truncation_length)

    def num_tokens(self, index: int) -> int:
        return min(self.dataset.num_tokens(index), self.truncation_length)

    def size(self, index: int) -> int:
        return min(self.dataset.size(index), self.truncation_length)


class RandomCropDataset(TruncateDataset):
    """`truncation_length` consecutive tokens of each longer item, from a random position that changes with the
    epoch."""

    def __init__(self, dataset: Any, truncation_length: int, seed: int = 1) -> None:
        super().__init__(dataset, truncation_length)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.dataset[index]
        excess = len(item) - self.truncation_length
        if excess <= 0:
            return item
        with data_utils.numpy_seed(self.seed, self.epoch, index):
            start = np.random.randint(0, excess)
        return item[start : start + self.truncation_length]


def maybe_shorten_dataset(
    dataset: Any, split: str, shorten_data_split_list: str, shorten_method: str, tokens_per_sample: int, seed: int
) -> Any:
    """Applies --shorten-method (`none`, `truncate` or `random_crop`) to the splits listed (empty: to all)."""
    if shorten_data_split_list and split not in shorten_data_split_list.split(","):
        return dataset
    if shorten_method == "truncate":
        return TruncateDataset(dataset, tokens_per_sample)
    if shorten_method == "random_crop":
        return RandomCropDataset(dataset, tokens_per_sample, seed)
    return dataset


class IdDataset(FairseqDataset):
    """Each item is its index; a batch is the indices as a tensor."""

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 0

    def collater(self, samples: list[int]) -> torch.Tensor:
        return torch.tensor(samples)


class NumelDataset(BaseWrapperDataset):
    """Each item is the number of elements of the wrapped item; with `reduce` a batch is their sum."""

    def __init__(self, dataset: Any, reduce: bool = False) -> None:
        super().__init__(dataset)
        self.reduce = reduce

    def __getitem__(self, index: int) -> int:
        return int(torch.numel(self.dataset[index]))

    def collater(self, samples: list[int]) -> Any:
        return sum(samples) if self.reduce else torch.tensor(samples)


class NumSamplesDataset(FairseqDataset):
    """A batch is the number of its items."""

    def __getitem__(self, index: int) -> int:
        return 1

    def __len__(self) -> int:
        return 0

    def collater(self, samples: list[int]) -> int:
        return sum(samples)


class SortDataset(BaseWrapperDataset):
    """Orders the items by `sort_order`: key arrays, the first one primary."""

    def __init__(self, dataset: Any, sort_order: Sequence[np.ndarray] | np.ndarray) -> None:
        super().__init__(dataset)
        keys = [sort_order] if isinstance(sort_order, np.ndarray) else list(sort_order)
        if any(len(key) != len(dataset) for key in keys):
            raise ValueError(f"sort keys must have one value for each of the {len(dataset)} items")
        self.sort_order = keys

    def ordered_indices(self) -> np.ndarray:
        # lexsort takes the primary key last.
        return np.lexsort(self.sort_order[::-1])


class NestedDictionaryDataset(FairseqDataset):
    """Several datasets of equal length under the keys of a nested dictionary; items and batches have its shape."""

    def __init__(self, defn: dict[str, Any], sizes: Sequence[np.ndarray] | np.ndarray | None = None) -> None:
        super().__init__()
        self.defn: OrderedDict[str, Any] = OrderedDict(_flatten(defn))
        self._sizes = [sizes] if isinstance(sizes, np.ndarray) else sizes
        # Datasets of length 0, as IdDataset, go with any length.
        lengths = {len(dataset) for dataset in self.defn.values()} - {0}
        if len(lengths) > 1:
            raise ValueError(f"nested datasets have different lengths: {sorted(lengths)}")
        self._len = lengths.pop() if lengths else 0

    def __getitem__(self, index: int) -> OrderedDict[str, Any]:
        return OrderedDict((key, dataset[index]) for key, dataset in self.defn.items())

    def __len__(self) -> int:
        return self._len

    def collater(self, samples: list[Any]) -> dict[str, Any]:
        if not samples:
            return {}
        batch: dict[str, Any] = {}
        for path, dataset in self.defn.items():
            values = [sample[path] for sample in samples]
            level = batch
            *parents, key = path.split(".")
            for parent in parents:
                level = level.setdefault(parent, {})
            collate = getattr(dataset, "collater", torch.utils.data.default_collate)
            level[key] = collate(values)
        return batch

    @property
    def sizes(self) -> np.ndarray:
        """The first of the given size arrays, or those of the first dataset that has any."""
        if self._sizes is not None:
            return np.asarray(self._sizes[0])
        return next(dataset.sizes for dataset in self.defn.values() if hasattr(dataset, "sizes"))

    def num_tokens(self, index: int) -> int:
        return int(np.max(self.size(index)))

    def size(self, index: int) -> Any:
        if self._sizes is not None and len(self._sizes) > 1:
            return tuple(int(sizes[index]) for sizes in self._sizes)
        return int(self.sizes[index])

    @property
    def supports_prefetch(self) -> bool:
        return any(getattr(dataset, "supports_prefetch", False) for dataset in self.defn.values())

    def prefetch(self, indices: Sequence[int]) -> None:
        """Passes the indices to the datasets that prefetch."""
        for dataset in self.defn.values():
            if getattr(dataset, "supports_prefetch", False):
                dataset.prefetch(indices)

    def set_epoch(self, epoch: int) -> None:
        for dataset in self.defn.values():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a.b": x}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
