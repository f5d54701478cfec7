"""Several datasets one after the other, as when a training split is sharded into `train`, `train1`, `train2`, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.utils.data

from fairseq.data.fairseq_dataset import FairseqDataset


class ConcatDataset(FairseqDataset):
    """Item i is found in the dataset that covers i; `sample_ratios` repeats each dataset a whole number of times.

    Where every part is one flat token stream, so is the whole (`contiguous`, `token_range`)."""

    def __init__(self, datasets: Sequence[Any], sample_ratios: int | Sequence[int] = 1) -> None:
        super().__init__()
        if not datasets:
            raise ValueError("a ConcatDataset needs at least one dataset")
        self.datasets = list(datasets)
        ratios = [sample_ratios] * len(self.datasets) if isinstance(sample_ratios, int) else list(sample_ratios)
        self.sample_ratios = ratios
        lengths = [ratio * len(dataset) for dataset, ratio in zip(self.datasets, ratios)]
        self.cumulative_sizes: list[int] = np.cumsum(lengths).tolist()
        self.real_sizes = [len(dataset) for dataset in self.datasets]
        self.contiguous = all(getattr(d, "contiguous", False) and r == 1 for d, r in zip(self.datasets, ratios))
        if self.contiguous:
            self._bounds = np.cumsum([0] + [int(np.sum(d.sizes, dtype=np.int64)) for d in self.datasets])

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def _locate(self, idx: int) -> tuple[int, int]:
        """(dataset, item in it) of item `idx`."""
        idx = range(len(self))[idx]
        part = int(np.searchsorted(self.cumulative_sizes, idx, side="right"))
        before = self.cumulative_sizes[part - 1] if part else 0
        return part, (idx - before) % self.real_sizes[part]

    def __getitem__(self, idx: int) -> Any:
        part, item = self._locate(idx)
        return self.datasets[part][item]

    def token_range(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the concatenated streams; needs `contiguous`."""
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        while start < end and first < len(self.datasets):
            stop = min(end, int(self._bounds[first + 1]))
            offset = int(self._bounds[first])
            pieces.append(self.datasets[first].token_range(start - offset, stop - offset))
            start, first = stop, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int64)])

    def collater(self, samples: list[Any]) -> Any:
        if hasattr(self.datasets[0], "collater"):
            return self.datasets[0].collater(samples)
        return torch.utils.data.default_collate(samples)

    @property
    def sizes(self) -> np.ndarray:
        """Lengths of all items in tokens."""
        return np.concatenate([np.tile(d.sizes, r) for d, r in zip(self.datasets, self.sample_ratios)])

    def num_tokens(self, index: int) -> int:
        part, item = self._locate(index)
        return self.datasets[part].num_tokens(item)

    def size(self, index: int) -> Any:
        part, item = self._locate(index)
        return self.datasets[part].size(item)

    def attr(self, attr: str, index: int) -> Any:
        part, item = self._locate(index)
        dataset = self.datasets[part]
        return dataset.attr(attr, item) if hasattr(dataset, "attr") else getattr(dataset, attr, None)

    @property
    def supports_prefetch(self) -> bool:
        return all(getattr(d, "supports_prefetch", False) for d in self.datasets)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prefetches in each dataset the items that it contains."""
        wanted = np.asarray(indices, dtype=np.int64)
        begin = 0
        for dataset, end, real in zip(self.datasets, self.cumulative_sizes, self.real_sizes):
            mine = wanted[(wanted >= begin) & (wanted < end)] - begin
            if getattr(dataset, "supports_prefetch", False) and len(mine):
                dataset.prefetch(mine % real)
            begin = end

    def set_epoch(self, epoch: int) -> None:
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
