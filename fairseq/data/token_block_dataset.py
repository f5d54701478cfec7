"""Cuts the token stream of a split into blocks, and shifts each block by one to make a language model's input.

Blocks are half-open ranges over the concatenated items (text lines). Their bounds are computed with array operations;
a block of a memory-mapped split is one slice of the map. Break modes and shifts follow fairseq 0.9."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.errors import BadFlag, UserError


def block_bounds(
    sizes: np.ndarray, block_size: int | None, break_mode: str | None, document_sep_len: int = 1
) -> np.ndarray:
    """Start and end of each block in the token stream: (blocks, 2) int64, for item lengths `sizes` (n,).

    none: every `block_size` tokens. eos: one item each. complete: as many whole items as fit, an overlong one alone.
    complete_doc: the same, ending at each item of `document_sep_len` tokens, which belongs to no block; blocks of one
    token are dropped."""
    if break_mode not in (None, "none", "eos", "complete", "complete_doc"):
        raise BadFlag("--sample-break-mode", break_mode, "none, complete, complete_doc or eos")
    stream = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    if break_mode == "eos":
        return np.stack((stream[:-1], stream[1:]), axis=1)
    if block_size is None or block_size < 1:
        raise BadFlag("--tokens-per-sample", block_size, "at least one token of block size (after --context-window)")
    if break_mode in (None, "none"):
        starts = np.arange(0, stream[-1], block_size, dtype=np.int64)
        return np.stack((starts, np.minimum(starts + block_size, stream[-1])), axis=1)
    if break_mode == "complete":
        starts, ends = _greedy(stream, block_size, np.empty(0, np.int64))
        keep = stream[ends] > stream[starts]
    else:
        starts, ends = _greedy(stream, block_size, np.flatnonzero(np.asarray(sizes) == document_sep_len))
        keep = stream[ends] - stream[starts] > 1
    return np.stack((stream[starts[keep]], stream[ends[keep]]), axis=1)


def _greedy(stream: np.ndarray, block_size: int, separators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Item ranges [start, end) of blocks of whole items, none of them containing a separator item.

    First the end of a block that starts at each item is computed, for all items at once; then a loop over the blocks
    follows these ends."""
    n = len(stream) - 1
    fitting = np.searchsorted(stream, stream[:-1] + block_size, side="right") - 1
    # An empty block takes the next item with tokens, however long.
    at_least = np.searchsorted(stream, stream[:-1], side="right")
    ends = np.minimum(np.maximum(fitting, at_least), n)
    following = ends
    if len(separators):
        next_separator = np.append(separators, n)[np.searchsorted(separators, np.arange(n))]
        following = np.where(next_separator <= ends, next_separator + 1, ends)
        ends = np.minimum(ends, next_separator)
    starts = []
    position = 0
    while position < n:
        starts.append(position)
        position = int(following[position])
    first = np.array(starts, dtype=np.int64)
    return first, ends[first]


class TokenBlockDataset(SizedDataset):
    """Blocks of a token stream. `sizes`: (blocks,) int64 lengths; `slice_indices`: (blocks, 2) bounds in the stream.

    joined: what stands before an item is the end of the item before, not an eos.
    With `include_targets` an item is (source, target, past target), else the block alone; all (length,) int64."""

    def __init__(
        self,
        dataset: Any,
        sizes: Sequence[int] | np.ndarray | torch.Tensor,
        block_size: int | None,
        pad: int,
        eos: int,
        break_mode: str | None = None,
        include_targets: bool = False,
        document_sep_len: int = 1,
        joined: bool = False,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.pad, self.eos = pad, eos
        self.include_targets = include_targets
        lengths = np.asarray(sizes)
        if len(dataset) == 0 or len(dataset) != len(lengths):
            raise UserError(f"a dataset of {len(dataset)} items with {len(lengths)} lengths cannot be cut into blocks")
        self.slice_indices = block_bounds(lengths, block_size, break_mode, document_sep_len)
        self.sizes = self.slice_indices[:, 1] - self.slice_indices[:, 0]
        self._stream = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self._flat = getattr(dataset, "contiguous", False)
        self._joined = joined and self._flat
        # The item that each block starts in, the offset there, and the item that its last token is in.
        starts, ends = self.slice_indices.T
        first = np.searchsorted(self._stream, starts, side="right") - 1
        last = np.searchsorted(self._stream, np.maximum(ends - 1, starts), side="right") - 1
        self.block_to_dataset_index = np.stack((first, starts - self._stream[first], last), axis=1)
        if break_mode == "eos":
            self.block_to_dataset_index[:, 0] = self.block_to_dataset_index[:, 2] = np.arange(len(lengths))
            self.block_to_dataset_index[:, 1] = 0
        if not self._flat:
            del self._stream

    def __len__(self) -> int:
        return len(self.sizes)

    def _block(self, index: int) -> np.ndarray:
        """The tokens of block `index`: (length,) int64, a copy."""
        start, end = self.slice_indices[index]
        if self._flat:
            return self.dataset.token_range(int(start), int(end)).astype(np.int64)
        first, offset, last = self.block_to_dataset_index[index].tolist()
        pieces = [np.asarray(self.dataset[i], dtype=np.int64) for i in range(first, last + 1)]
        return np.concatenate(pieces)[offset : offset + int(end - start)]

    def _preceding(self, index: int, count: int) -> np.ndarray:
        """The `count` tokens before the block within its first item."""
        first, offset, _ = self.block_to_dataset_index[index].tolist()
        if self._flat:
            start = int(self.slice_indices[index, 0])
            return self.dataset.token_range(start - count, start).astype(np.int64)
        return np.asarray(self.dataset[first], dtype=np.int64)[offset - count : offset]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        block = self._block(index)
        item = torch.from_numpy(block)
        if not self.include_targets:
            return item
        # One and two places to the right. At the start of an item its predecessor is taken to be an eos.
        offset = int(self.slice_indices[index, 0] if self._joined else self.block_to_dataset_index[index, 1])
        history = np.array([self.pad, self.eos], dtype=np.int64)
        available = min(offset, 2)
        if available:
            history = np.append(history, self._preceding(index, available))[-2:]
        shifted = np.concatenate((history, block))
        source, past = torch.from_numpy(shifted[1:-1]), torch.from_numpy(shifted[: len(block)])
        return source, item, past

    def attr(self, attr: str, index: int) -> Any:
        return self.dataset.attr(attr, int(self.block_to_dataset_index[index, 0]))

    @property
    def supports_prefetch(self) -> bool:
        return getattr(self.dataset, "supports_prefetch", False)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prefetches the items under the given blocks."""
        spans = self.block_to_dataset_index[np.unique(np.asarray(indices, dtype=np.int64))]
        items = np.unique(np.concatenate([np.arange(first, last + 1) for first, _, last in spans.tolist()]))
        self.dataset.prefetch(items)
