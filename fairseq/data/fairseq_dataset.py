"""The interface of datasets: the methods by which items are ordered, batched and collated. `BaseWrapperDataset`
forwards all of them to the dataset that it wraps, so that a wrapper overrides only those that it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.utils.data

from fairseq.data import data_utils


class FairseqDataset(torch.utils.data.Dataset):
    """Items with a length in tokens. Datasets with a `sizes` array get vectorised ordering, filtering and batching."""

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__")

    def collater(self, samples: list[Any]) -> Any:
        """Joins a list of items into one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define collater")

    def num_tokens(self, index: int) -> int:
        """The item's cost towards --max-tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define num_tokens")

    def size(self, index: int) -> Any:
        """The item's length, or lengths, compared with the model's maximum positions."""
        raise NotImplementedError(f"{type(self).__name__} must define size")

    def ordered_indices(self) -> np.ndarray:
        """The order in which batches are formed: (n,) int64."""
        return np.arange(len(self), dtype=np.int64)

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """`num_tokens` of many items at once: (n,) int64."""
        return np.fromiter(map(self.num_tokens, indices), dtype=np.int64, count=len(indices))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[list[int]]:
        """Cuts ordered `indices` into batches; see `data_utils.batch_by_size`."""
        return data_utils.batch_by_size(
            indices, self.num_tokens_vec(indices), max_tokens, max_sentences, required_batch_size_multiple
        )

    @property
    def supports_prefetch(self) -> bool:
        """Whether `prefetch` should be called with an epoch's indices before they are read."""
        return False

    def attr(self, attr: str, index: int) -> Any:
        """An attribute that may depend on the item (it does in a ConcatDataset)."""
        return getattr(self, attr, None)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Loads items ahead of an epoch, where `supports_prefetch` says so."""
        raise NotImplementedError(f"{type(self).__name__} has no prefetch; ask supports_prefetch first")

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch; does nothing by default."""


class SizedDataset(FairseqDataset):
    """Items whose length and cost are entries of the integer array `sizes` (n,)."""

    sizes: Any

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices].astype(np.int64)

    def size(self, index: int) -> int:
        return int(self.sizes[index])


class BaseWrapperDataset(FairseqDataset):
    """A dataset that forwards all methods to the wrapped `dataset`."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def collater(self, samples: list[Any]) -> Any:
        if hasattr(self.dataset, "collater"):
            return self.dataset.collater(samples)
        return torch.utils.data.default_collate(samples)

    @property
    def sizes(self) -> np.ndarray:
        """Lengths of all items in tokens."""
        return self.dataset.sizes

    def num_tokens(self, index: int) -> int:
        return self.dataset.num_tokens(index)

    def size(self, index: int) -> Any:
        return self.dataset.size(index)

    def ordered_indices(self) -> np.ndarray:
        return self.dataset.ordered_indices()

    @property
    def supports_prefetch(self) -> bool:
        return getattr(self.dataset, "supports_prefetch", False)

    def attr(self, attr: str, index: int) -> Any:
        return self.dataset.attr(attr, index) if hasattr(self.dataset, "attr") else getattr(self.dataset, attr, None)

    def prefetch(self, indices: Sequence[int]) -> None:
        self.dataset.prefetch(indices)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
