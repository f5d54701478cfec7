"""Opening and writing binarised splits: detects the format at a path, opens it, and makes builders for writing.

Formats: `mmap` (mmap_dataset.py), `lazy` and `cached` (legacy_dataset.py), `raw` (raw_dataset.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.data import legacy_dataset, mmap_dataset
from fairseq.data.dictionary import Dictionary
from fairseq.data.legacy_dataset import IndexedCachedDataset, IndexedDataset, IndexedDatasetBuilder
from fairseq.data.mmap_dataset import (
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    code,
    data_file_path,
    dtypes,
    index_file_path,
)
from fairseq.data.raw_dataset import IndexedRawTextDataset
from fairseq.errors import BadFlag, UserError
from fairseq.files.inputs import open_input

__all__ = [
    "IndexedCachedDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "IndexedRawTextDataset",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "best_fitting_dtype",
    "code",
    "data_file_path",
    "dataset_exists",
    "dtypes",
    "get_available_dataset_impl",
    "index_file_path",
    "infer_dataset_impl",
    "make_builder",
    "make_dataset",
]


def get_available_dataset_impl() -> list[str]:
    """The choices of --dataset-impl."""
    return ["raw", "lazy", "cached", "mmap"]


def best_fitting_dtype(vocab_size: int | None = None) -> Any:
    """uint16 below 65,500 words, else int32: the widest type that fairseq 0.9 can read too."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def infer_dataset_impl(path: str) -> str | None:
    """The format stored at `path` (no extension), or None when there is none or it is unknown."""
    if IndexedRawTextDataset.exists(path):
        return "raw"
    if not IndexedDataset.exists(path):
        return None
    with open_input(index_file_path(path)) as stream:
        magic = stream.read(8)
    return {legacy_dataset.MAGIC: "cached", mmap_dataset.MAGIC[:8]: "mmap"}.get(magic)


def dataset_exists(path: str, impl: str | None) -> bool:
    """Whether the files of format `impl` are at `path`."""
    return IndexedRawTextDataset.exists(path) if impl == "raw" else IndexedDataset.exists(path)


def make_builder(out_file: str, impl: str, vocab_size: int | None = None) -> Any:
    """A builder with add_item, add_items, merge_file_ and finalize(idx path); `out_file` is the `.bin` path."""
    if impl == "mmap":
        return MMapIndexedDatasetBuilder(out_file, dtype=best_fitting_dtype(vocab_size))
    if impl in ("lazy", "cached"):
        return IndexedDatasetBuilder(out_file)
    raise BadFlag("--dataset-impl", impl, "mmap, lazy or cached for a file that is written")


def make_dataset(path: str, impl: str, fix_lua_indexing: bool = False, dictionary: Dictionary | None = None) -> Any:
    """Opens the split at `path` as `impl`, or gives None when it is absent."""
    if impl not in get_available_dataset_impl():
        raise BadFlag("--dataset-impl", impl, "one of " + ", ".join(get_available_dataset_impl()))
    if not dataset_exists(path, impl):
        return None
    if impl == "raw":
        if dictionary is None:
            raise UserError(f"{path}: raw text needs a dictionary to be read")
        return IndexedRawTextDataset(path, dictionary)
    if impl == "mmap":
        return MMapIndexedDataset(path)
    cls = IndexedDataset if impl == "lazy" else IndexedCachedDataset
    return cls(path, fix_lua_indexing=fix_lua_indexing)
