"""Datastore entries of several sequences as flat arrays: entry `ids[i]` belongs to sequence `rows[i]`. The index, the
automaton, the votes and the strategies all exchange entries in this form."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Entries:
    """Entries of several sequences.

    rows (n,) int64: sequence numbers, ascending; ids (n,) int64: datastore entries; scores (n,) float32 or None, larger
    is nearer; weights (n,) float32: the weights of their votes, or None for weights of 1; bounds (B + 1,) int64: the
    entries of sequence b are those from bounds[b] to bounds[b + 1], or None until `within` is called; found (B,) int64:
    how many of each sequence's entries, its first ones, were found by a search, or None where that is not known."""

    rows: Tensor
    ids: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None
    bounds: Tensor | None = None
    found: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def within(self, sequences: int) -> Tensor:
        """(sequences + 1,) int64: the `bounds` of the first `sequences` sequences."""
        if self.bounds is None or self.bounds.shape[0] <= sequences:
            self.bounds = bounds_of_rows(self.rows, sequences)
        return self.bounds[: sequences + 1]

    def counts(self, sequences: int) -> Tensor:
        """(sequences,) int64: number of entries of each sequence."""
        bounds = self.within(sequences)
        return bounds[1:] - bounds[:-1]

    def select(self, chosen: Tensor | slice) -> Entries:
        """The entries at `chosen`, a mask, positions or a slice."""
        scores, weights = (None if values is None else values[chosen] for values in (self.scores, self.weights))
        return Entries(self.rows[chosen], self.ids[chosen], scores, weights)

    def places_of_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the entries of the sequences `chosen` (B,) int64, one after another, and (B + 1,) their bounds.
        A sequence may be chosen several times; -1 stands for one without entries."""
        within = self.within(int(chosen.max()) + 1) if len(chosen) else self.rows.new_zeros(1)
        if len(within) == 1:  # nothing but -1
            return self.rows.new_zeros(0), self.rows.new_zeros(len(chosen) + 1)
        known = chosen.clamp(min=0)
        counts = torch.where(chosen < 0, 0, within[known + 1] - within[known])
        bounds = bounds_of(counts)
        places = torch.arange(int(bounds[-1]), device=self.rows.device)
        return places + torch.repeat_interleave(within[known] - bounds[:-1], counts), bounds

    def of_rows(self, chosen: Tensor) -> Entries:
        """The entries of the sequences `chosen` (B,) int64, renumbered from 0 in this order; see `places_of_rows`."""
        places, bounds = self.places_of_rows(chosen)
        taken = self.select(places)
        numbers = torch.arange(len(chosen), device=chosen.device)
        taken.rows, taken.bounds = numbers.repeat_interleave(bounds[1:] - bounds[:-1]), bounds
        return taken

    def of_first(self, sequences: int) -> Entries:
        """The entries of the first `sequences` sequences."""
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
    """(count + 1,): row b occupies positions bounds[b] to bounds[b + 1] of `rows` (n,), which are ascending."""
    return torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, also of a read-only memory map (no caller writes to it)."""
    if array.flags.writeable or not array.size:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(array.data.cast("B"), dtype=_TORCH_TYPES[array.dtype.str])


_TORCH_TYPES = {"<i8": torch.int64, "<i4": torch.int32, "<i2": torch.int16, "|u1": torch.uint8}
