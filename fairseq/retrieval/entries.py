"""Datastore entries of several sequences as flat arrays: `rows[i]` says to which sequence entry `ids[i]` belongs. The
index, the automaton, the votes and the strategies all exchange entries in this form."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Entries:
    """Entries of several sequences: rows (n,) int64 sequence numbers, ascending; ids (n,) int64 datastore entries;
    scores (n,) float32 or None, larger is nearer; weights (n,) float32, how often each one votes, or None for once;
    bounds (B + 1,) int64, between which each of B sequences has its entries, or None until `within` is asked."""

    rows: Tensor
    ids: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None
    bounds: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def within(self, sequences: int) -> Tensor:
        """(sequences + 1,) int64: between which positions each sequence has its entries."""
        if self.bounds is None or self.bounds.shape[0] <= sequences:
            self.bounds = bounds_of_rows(self.rows, sequences)
        return self.bounds[: sequences + 1]

    def counts(self, sequences: int) -> Tensor:
        """(sequences,) int64: how many entries each sequence has."""
        bounds = self.within(sequences)
        return bounds[1:] - bounds[:-1]

    def select(self, chosen: Tensor | slice) -> Entries:
        """The entries at `chosen`, a mask, positions or a slice."""
        scores, weights = (None if values is None else values[chosen] for values in (self.scores, self.weights))
        return Entries(self.rows[chosen], self.ids[chosen], scores, weights)

    def of_first(self, sequences: int) -> Entries:
        """The entries of the first sequences."""
        bounds = self.within(sequences)
        end = int(bounds[-1])
        if end == len(self):
            return self
        first = self.select(slice(end))
        first.bounds = bounds
        return first


def no_entries(device: torch.device | str = "cpu") -> Entries:
    """No entries at all."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return Entries(nothing, nothing, torch.zeros(0, device=device))


def starts_of(counts: Tensor) -> Tensor:
    """Exclusive cumulative sum: where each group of `counts` begins in a flat array."""
    return counts.cumsum(0) - counts


def bounds_of(counts: Tensor) -> Tensor:
    """(B + 1,): inclusive cumulative sum after a leading zero; group b is [bounds[b], bounds[b + 1])."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def bounds_of_rows(rows: Tensor, count: int) -> Tensor:
    """(count + 1,): between which positions of `rows` (n,), ascending, each of the numbers below `count` stands."""
    return torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory, also over a read-only map (nothing here ever writes to it)."""
    if array.flags.writeable or not array.size:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(array.data.cast("B"), dtype=_TORCH_TYPES[array.dtype.str])


_TORCH_TYPES = {"<i8": torch.int64, "<i4": torch.int32, "<i2": torch.int16, "|u1": torch.uint8}
