"""Windows as the Hugging Face community cuts a text for perplexity: each as long as the model reads, moved on by a
stride, with the loss of the last tokens of each window alone. Nothing stands before a text's first token, so it is
never scored; with a stride as long as the windows no window's first token is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairseq.data.fairseq_dataset import SizedDataset
from fairseq.errors import BadFlag, UserError


def window_bounds(
    lengths: NDArray[np.int64], max_length: int, stride: int, drop_remainder: bool = False
) -> NDArray[np.int64]:
    """(windows, 3) int64 for texts of `lengths` that follow each other: where a window begins, its first scored token,
    its end. Windows end at multiples of `stride` and at the end of the text, and no window reaches into another text.

    drop_remainder: what is left over after the last multiple of max_length is left out, but not a whole text."""
    whole = lengths // max_length * max_length
    used = np.where(drop_remainder & (lengths >= max_length), whole, lengths)
    counts = -(-used // stride)
    text = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = number * stride
    end = np.minimum(place + stride, used[text])
    begin = np.maximum(place + stride - max_length, 0)
    first = np.maximum(place, begin + 1)
    keep = end > first
    offset = (np.cumsum(lengths) - lengths)[text]
    return np.stack([begin + offset, first + offset, end + offset], axis=1)[keep]


def rolling_bounds(lengths: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """The same for windows that each score the next `max_length` tokens after one token of context, the last one with
    as much context as makes it full: so lm-evaluation-harness cuts. A window that begins one before its text has the
    token that stands before texts there."""
    counts = -(-lengths // max_length)
    text = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_length
    end = np.minimum(first + max_length, lengths[text])
    begin = np.maximum(end - max_length - 1, -1)
    return np.stack([begin, first, end], axis=1) + (np.cumsum(lengths) - lengths)[text][:, None]


class SlidingWindowDataset(SizedDataset):
    """Windows of a split's token stream. `sizes`: (windows,) scored tokens; `dropped`: tokens of the remainders that
    are left out.

    rolling: windows by `rolling_bounds`, the vocabulary's `eos()` before each text. group: the texts are so many items
    of `dataset` each, joined; None: all of them are one text."""

    def __init__(
        self,
        dataset: Any,
        vocabulary: Any,
        max_length: int,
        stride: int | None = None,
        drop_remainder: bool = False,
        group: int | None = None,
        rolling: bool = False,
    ) -> None:
        super().__init__()
        stride = max_length if stride is None else stride
        if max_length < 2:
            raise BadFlag("--max-length", max_length, "at least 2: a window's first token is not scored")
        if stride > max_length:
            raise BadFlag("--stride", stride, f"at most --max-length {max_length}")
        self.dataset, self.vocab, self.max_length, self.stride = dataset, vocabulary, max_length, stride
        items = np.asarray(dataset.sizes, np.int64)
        ends = np.cumsum(items)
        chosen = [len(items) - 1] if group is None else [*range(group - 1, len(items), group), len(items) - 1]
        lengths: NDArray[np.int64] = np.diff(np.concatenate([[0], np.unique(ends[chosen])]))
        self._text_starts = np.cumsum(lengths) - lengths
        if rolling:
            self.bounds = rolling_bounds(lengths, max_length)
        else:
            self.bounds = window_bounds(lengths, max_length, stride, drop_remainder)
        self.sizes = self.bounds[:, 2] - self.bounds[:, 1]
        remainder = lengths[lengths >= max_length] % max_length
        self.dropped = int(remainder.sum()) if drop_remainder else 0

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A window: source (length - 1,), target (length - 1,) of which the first `start` are context."""
        begin, first, end = self.bounds[index].tolist()
        known = max(0, begin)
        if begin + 1 == first and first in self._text_starts:  # nothing of the text stands before its first token
            known = first
        tokens = torch.from_numpy(self.dataset.token_range(known, end).astype(np.int64))
        if known > begin:
            tokens = torch.cat([tokens.new_tensor([self.vocab.eos()]), tokens])
        return {"id": int(index), "source": tokens[:-1], "target": tokens[1:], "start": first - 1 - begin}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch in the form of `monolingual_dataset.collate`, with `start_indices` as context windows have them."""
        if not samples:
            return {}
        pad, width = self.vocab.pad(), max(len(sample["source"]) for sample in samples)
        source = torch.full((len(samples), width), pad)
        target = torch.full_like(source, pad)
        for row, sample in enumerate(samples):
            length, start = len(sample["source"]), sample["start"]
            source[row, :length] = sample["source"]
            target[row, start:length] = sample["target"][start:]
        highest = max(int(source.max()), int(target.max()))
        if highest >= len(self.vocab):
            raise UserError(
                f"the data: found the token id {highest}, expected at most {len(self.vocab) - 1} as the vocabulary "
                "has; preprocess the text again"
            )
        lengths = torch.tensor([len(sample["source"]) for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": sum(len(sample["target"]) - sample["start"] for sample in samples),
            "net_input": {"src_tokens": source, "src_lengths": lengths},
            "target": target,
            "start_indices": [sample["start"] for sample in samples],
        }

    def ordered_indices(self) -> NDArray[np.int64]:
        """The order of the text, in which a datastore's entries follow each other."""
        return np.arange(len(self))

    def num_tokens_vec(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) tokens that the model reads for each window."""
        return self.bounds[indices, 2] - self.bounds[indices, 0] - 1
