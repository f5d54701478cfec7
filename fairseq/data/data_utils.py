"""Small public helpers around datasets: opening a binarised split, padding items into a matrix, filtering by length and
cutting an ordered list of items into batches. File names and batching rules follow fairseq 0.9."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairseq.errors import UserError

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary

logger = logging.getLogger(__name__)


def infer_language_pair(path: str) -> tuple[str | None, str | None]:
    """The languages in the first file name of the form `{split}.{src}-{dst}.*` under `path`, else (None, None)."""
    for filename in sorted(os.listdir(path)):
        parts = filename.split(".")
        if len(parts) >= 3 and len(parts[1].split("-")) == 2:
            source, target = parts[1].split("-")
            return source, target
    return None, None


def collate_tokens(
    values: Sequence[torch.Tensor],
    pad_idx: int,
    eos_idx: int | None = None,
    left_pad: bool = False,
    move_eos_to_beginning: bool = False,
) -> torch.Tensor:
    """Stacks 1-D tensors into (n, longest), padded with `pad_idx`; the final eos of each can move to the front."""
    batch = values[0].new_full((len(values), max(v.numel() for v in values)), pad_idx)
    for row, value in zip(batch, values):
        n = value.numel()
        if move_eos_to_beginning:
            if eos_idx is not None and value[-1] != eos_idx:
                raise ValueError(f"an item ends in {int(value[-1])}, expected end-of-sentence ({eos_idx})")
            value = torch.roll(value, 1)
        row[len(row) - n if left_pad else 0 :][:n] = value
    return batch


def load_indexed_dataset(
    path: str, dictionary: Dictionary | None = None, dataset_impl: str | None = None, combine: bool = False
) -> Any:
    """Opens the binarised split at `path` (no extension), or None when it is absent.

    With `combine`, `path`, `path1`, `path2`, ... are read until one is missing, and concatenated."""
    from fairseq.data import indexed_dataset
    from fairseq.data.concat_dataset import ConcatDataset
    from fairseq.data.text_description import check_text

    datasets: list[Any] = []
    for k in itertools.count():
        shard = _raw_copy(path + (str(k) if k > 0 else ""))
        check_text(shard, dictionary)
        impl = dataset_impl or indexed_dataset.infer_dataset_impl(shard) or "cached"
        dataset = indexed_dataset.make_dataset(shard, impl, fix_lua_indexing=True, dictionary=dictionary)
        if dataset is None:
            break
        logger.info("loaded %d examples from: %s", len(dataset), shard)
        datasets.append(dataset)
        if not combine:
            break
    if not datasets:
        return None
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def split_exists(path: str) -> bool:
    """Whether a binarised split, or one of the raw format, is at `path` (no extension)."""
    from fairseq.data import indexed_dataset

    shard = _raw_copy(path)
    return any(indexed_dataset.dataset_exists(shard, impl) for impl in ("raw", "mmap"))


def _raw_copy(path: str) -> str:
    """The path of a raw split: `path`, or the name that `preprocess.py --only-source --dataset-impl raw` writes, if
    only that exists. (fairseq writes the second and reads the first.)"""
    from fairseq.data import indexed_dataset

    named = path + ".None-None"
    return named if indexed_dataset.infer_dataset_impl(path) is None and os.path.isfile(named) else path


@contextlib.contextmanager
def numpy_seed(seed: int | None, *addl_seeds: int) -> Iterator[None]:
    """Seeds numpy's global generator and restores its state afterwards; `None` leaves it alone.

    Several components are hashed together (modulo 10^6), as published runs did."""
    if seed is None:
        yield
        return
    if addl_seeds:
        seed = int(hash((seed, *addl_seeds)) % 1e6)  # a float on purpose: the rounding decides the seed
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _fits(size: Any, max_positions: Any) -> bool:
    """Component-wise `size <= max_positions`; None is unlimited, a number is compared with the largest component."""
    if max_positions is None:
        return True
    if isinstance(max_positions, dict):
        return all(_fits(size[key], max_positions[key]) for key in size.keys() & max_positions.keys())
    if isinstance(max_positions, int | float):
        return bool(np.max(size) <= max_positions)
    if not isinstance(size, list | tuple):
        return all(_fits(size, limit) for limit in max_positions)
    return all(_fits(s, limit) for s, limit in zip(size, max_positions))


def filter_by_size(indices: np.ndarray, dataset: Any, max_positions: Any, raise_exception: bool = False) -> np.ndarray:
    """Drops items longer than `max_positions` (number, tuple or dict), with a warning.

    `raise_exception` makes the first such item a UserError. Returns the kept indices in their order."""
    indices = np.asarray(indices, dtype=np.int64)
    limit = max_positions
    if isinstance(limit, list | tuple) and len(limit) == 1:
        limit = limit[0]
    sizes = getattr(dataset, "sizes", None)
    if limit is None:
        return indices
    if isinstance(limit, int | float) and isinstance(sizes, np.ndarray) and sizes.ndim == 1:
        keep = sizes[indices] <= limit
    else:
        keep = np.fromiter((_fits(dataset.size(i), limit) for i in indices), dtype=bool, count=len(indices))
    ignored = indices[~keep]
    if len(ignored) == 0:
        return indices
    first = int(ignored[0])
    if raise_exception:
        raise UserError(
            f"item {first} has length {dataset.size(first)}, more than the {max_positions} positions allowed; "
            "use --skip-invalid-size-inputs-valid-test to leave such items out"
        )
    logger.warning(
        "%d samples have invalid sizes and will be skipped, max_positions=%s, first few sample ids=%s",
        len(ignored),
        max_positions,
        ignored[:10].tolist(),
    )
    return indices[keep]


def batch_by_size(
    indices: Sequence[int] | np.ndarray,
    num_tokens_fn: Callable[[int], int] | np.ndarray,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
) -> list[list[int]]:
    """Cuts ordered `indices` into batches of at most `max_tokens` (items x longest item) and `max_sentences`.

    `num_tokens_fn` gives one item's length, or is an array with the lengths of `indices`. A full batch gives up its
    tail so that its size is a multiple of `required_batch_size_multiple`, unless it is smaller than that; the tail
    opens the next batch (fairseq 0.9: the last batch is kept whatever its size). UserError for an item too long."""
    order = np.asarray(indices, dtype=np.int64)
    if callable(num_tokens_fn):
        lengths = np.fromiter((num_tokens_fn(i) for i in order.tolist()), dtype=np.int64, count=len(order))
    else:
        lengths = np.asarray(num_tokens_fn, dtype=np.int64)
    token_limit = float("inf") if max_tokens is None or max_tokens < 0 else max_tokens
    item_limit = float("inf") if max_sentences is None or max_sentences < 0 else max_sentences
    multiple = max(1, required_batch_size_multiple)
    too_long = np.flatnonzero(lengths > token_limit)
    if len(too_long):
        first = too_long[0]
        raise UserError(
            f"item {order[first]} has {lengths[first]} tokens, more than --max-tokens {max_tokens}; raise --max-tokens"
        )

    # Plain integers in a tight loop: a batch holds a handful of items, too few for array calls to pay off.
    sizes: list[int] = lengths.tolist()
    bounds: list[int] = []
    start = longest = 0
    for i, length in enumerate(sizes):
        longest = max(longest, length)
        n = i - start
        if n and (n == item_limit or (n + 1) * longest > token_limit):
            start += max(multiple * (n // multiple), n % multiple)
            bounds.append(start)
            longest = max(sizes[start : i + 1])
    ids: list[int] = order.tolist()
    if ids:
        bounds.append(len(ids))
    return [ids[a:b] for a, b in zip([0, *bounds], bounds)]


def post_process(sentence: str, symbol: str | None) -> str:
    """Undoes sub-word segmentation. `symbol`: sentencepiece, wordpiece, letter, silence, _EOW, subword_nmt, or a
    marker such as "@@ " that is deleted wherever it stands."""
    if symbol is None or symbol == "none":
        return sentence
    joiners = {"sentencepiece": "\u2581", "wordpiece": "_", "letter": "|", "_EOW": "_EOW"}
    if symbol in joiners:
        return sentence.replace(" ", "").replace(joiners[symbol], " ").strip()
    if symbol == "silence":
        return " ".join(sentence.replace("<SIL>", "").split())
    if symbol in ("subword_nmt", "@@"):
        symbol = "@@ "
    return (sentence + " ").replace(symbol, "").rstrip()


process_bpe_symbol = post_process
