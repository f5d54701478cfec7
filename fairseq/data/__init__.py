"""Data: dictionary, binarised files, token blocks, context windows, batches. This package does not import models."""

from fairseq.data import encoders
from fairseq.data.concat_dataset import ConcatDataset
from fairseq.data.dictionary import Dictionary, TruncatedDictionary
from fairseq.data.fairseq_dataset import BaseWrapperDataset, FairseqDataset
from fairseq.data.indexed_dataset import (
    IndexedCachedDataset,
    IndexedDataset,
    IndexedRawTextDataset,
    MMapIndexedDataset,
)
from fairseq.data.iterators import CountingIterator, EpochBatchIterator, GroupedIterator, ShardedIterator
from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.data.wrapper_datasets import (
    AppendTokenDataset,
    IdDataset,
    LeftPadDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    PadDataset,
    PrependTokenDataset,
    RandomCropDataset,
    RightPadDataset,
    SortDataset,
    StripTokenDataset,
    TruncateDataset,
    maybe_shorten_dataset,
)

__all__ = [
    "AppendTokenDataset",
    "BaseWrapperDataset",
    "ConcatDataset",
    "CountingIterator",
    "Dictionary",
    "EpochBatchIterator",
    "FairseqDataset",
    "GroupedIterator",
    "IdDataset",
    "IndexedCachedDataset",
    "IndexedDataset",
    "IndexedRawTextDataset",
    "LMContextWindowDataset",
    "LeftPadDataset",
    "MMapIndexedDataset",
    "MonolingualDataset",
    "NestedDictionaryDataset",
    "NumSamplesDataset",
    "NumelDataset",
    "PadDataset",
    "PrependTokenDataset",
    "RandomCropDataset",
    "RightPadDataset",
    "ShardedIterator",
    "SortDataset",
    "StripTokenDataset",
    "TokenBlockDataset",
    "TruncateDataset",
    "TruncatedDictionary",
    "encoders",
    "maybe_shorten_dataset",
]
