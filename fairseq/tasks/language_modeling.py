"""The `language_modeling` task: text as token blocks, the next token as target. It also declares the
flags that describe a datastore, because the RetoMaton fork made them flags of this task."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import numpy as np
from torch import Tensor

from fairseq import utils
from fairseq.data import (
    Dictionary,
    MonolingualDataset,
    TokenBlockDataset,
    TruncateDataset,
    TruncatedDictionary,
    data_utils,
)
from fairseq.data.sliding_windows import SlidingWindowDataset
from fairseq.data.token_ids import open_vocabulary
from fairseq.errors import BadFile, BadFlag, MissingFile
from fairseq.files.fingerprint import vocabulary_file
from fairseq.flag_types import any_int, finite_float, positive_int, row_count
from fairseq.key_types import DEFAULT as DEFAULT_KEY_TYPE
from fairseq.key_types import KEY_TYPES
from fairseq.tasks import FairseqTask, register_task

logger = logging.getLogger(__name__)

BREAK_MODES = ("none", "complete", "complete_doc", "eos")


@register_task("language_modeling")
class LanguageModelingTask(FairseqTask):
    """Trains or evaluates a language model on one data folder (or several: one per epoch, in turn)."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the task's flags, and those of the RetoMaton fork that describe the datastore."""
        add = parser.add_argument
        add("data", help="folder with dict.txt and the binarised splits; several are separated by colons")
        add(
            "--sample-break-mode",
            choices=BREAK_MODES,
            metavar="MODE",
            help="how the text is cut into samples (default: none)",
        )
        add(
            "--tokens-per-sample",
            default=1024,
            type=positive_int,
            metavar="N",
            help="longest sample; evaluation uses the checkpoint's",
        )
        add(
            "--output-dictionary-size",
            default=-1,
            type=any_int,
            metavar="N",
            help="keep only N words in the targets (default: all)",
        )
        add("--self-target", action="store_true", help="include the token itself as target")
        add("--future-target", action="store_true", help="include the next token as target")
        add("--past-target", action="store_true", help="include the previous token as target")
        add("--add-bos-token", action="store_true", help="prepend <s> to each sample")
        add(
            "--max-target-positions",
            type=positive_int,
            metavar="N",
            help="longest input of the model (default: --tokens-per-sample)",
        )
        add("--truncate-sequence", action="store_true", help="cut each line to --tokens-per-sample")
        what = f"what keys are made of: {', '.join(sorted(KEY_TYPES))} (default: {DEFAULT_KEY_TYPE})"
        add("--knn-keytype", metavar="NAME", help=what)
        add("--probe", default=8, type=any_int, metavar="N", help="lists of the index that a search visits")
        add("--k", default=1024, type=any_int, metavar="N", help="neighbours that a search returns")
        add("--dstore-size", type=row_count, metavar="N", help="its entries (default: known from its files)")
        add("--dstore-filename", metavar="PREFIX", help="prefix of the datastore's files")
        add("--indexfile", metavar="FILE", help="FAISS index of the datastore's keys")
        add("--lmbda", default=0.0, type=finite_float, metavar="L", help="weight of retrieval, from 0 (none) to 1")
        add(
            "--knn-sim-func",
            metavar="NAME",
            help="score of an entry: do_not_recomp_l2 (the index's distance), dot; default: exact L2 from the keys",
        )
        add("--faiss-metric-type", default="l2", metavar="NAME", help="metric of the index: l2 or ip")
        add("--no-load-keys", action="store_true", help="do not open the keys")
        add("--dstore-fp16", action="store_true", help="the keys are float16")
        add("--move-dstore-to-mem", action="store_true", help="copy the values (and keys, if opened) into memory")

    def __init__(
        self, args: argparse.Namespace, dictionary: Dictionary, output_dictionary: Any = None, targets: Any = None
    ) -> None:
        super().__init__(args)
        self.dictionary = dictionary
        self.output_dictionary = output_dictionary or dictionary
        self.targets = targets or ["future"]

    @classmethod
    def setup_task(cls, args: argparse.Namespace, **kwargs: Any) -> LanguageModelingTask:
        """Reads the dictionary of the (first) data folder."""
        dictionary = open_vocabulary(utils.split_paths(args.data)[0])
        logger.info("dictionary: %d types", len(dictionary))
        size = getattr(args, "output_dictionary_size", -1)
        output_dictionary = TruncatedDictionary(dictionary, size) if size >= 0 else dictionary
        if hasattr(args, "exclude_self_target"):  # checkpoints of older versions
            args.self_target = not args.exclude_self_target
        targets = [kind for kind in ("self", "future", "past") if getattr(args, kind + "_target", False)]
        return cls(args, dictionary, output_dictionary, targets)

    def check_folders(self, split: str) -> None:
        """Refuses, before any work, a data folder of a later epoch that has another dictionary, or lacks `split`."""
        folders = utils.split_paths(self.args.data)
        for folder in folders:
            path = os.path.join(folder, split)
            if not data_utils.split_exists(path):
                raise MissingFile(path + ".idx", f"the folder has no {split!r}; check it and --train-subset")
        for folder in folders[1:]:
            if open_vocabulary(folder).symbols != self.dictionary.symbols:
                expected = f"the words of {folders[0]}, in the same order"
                remedy = "preprocess the text again with --srcdict"
                raise BadFile(vocabulary_file(folder), "another dictionary", expected, remedy)
        if len(folders) > 1:
            logger.info("%d data folders take turns; validation reads %s", len(folders), folders[0])

    def build_model(self, args: argparse.Namespace) -> Any:
        """The model; ValueError when it cannot predict the requested targets."""
        model = super().build_model(args)
        for target in self.targets:
            if target not in model.supported_targets:
                raise BadFlag(f"--{target}-target", target, f"targets of this model: {sorted(model.supported_targets)}")
        return model

    def load_dataset(self, split: str, epoch: int = 0, combine: bool = False, **kwargs: Any) -> None:
        """Loads `split` from the data folder of this epoch and cuts it into samples."""
        folders = utils.split_paths(self.args.data)
        path = os.path.join(folders[epoch % len(folders)], split)
        dataset = data_utils.load_indexed_dataset(path, self.dictionary, self.args.dataset_impl, combine=combine)
        if dataset is None:
            flags = "--gen-subset, --train-subset or --valid-subset"
            raise MissingFile(path + ".idx", f"the split {split!r} is not in this folder; check it and {flags}")
        if not np.asarray(dataset.sizes).any():
            raise BadFile(path, "a split without any text", "at least one token", "preprocess it again from a text")
        self.datasets[split] = self.samples_of(dataset)

    def _windows(self, dataset: Any) -> SlidingWindowDataset:
        """`--max-length` and `--stride`: windows without anything before the text."""
        args = self.args
        if getattr(args, "context_window", 0) or args.sample_break_mode not in (None, "none"):
            found = "--context-window or --sample-break-mode beside it"
            raise BadFlag("--max-length", found, "it alone: it says context and samples by itself")
        if not getattr(dataset, "contiguous", False):
            raise BadFlag("--max-length", "a text that is no mmap file", "one that preprocess wrote")
        return SlidingWindowDataset(
            dataset,
            self.dictionary,
            args.max_length,
            args.stride,
            args.drop_remainder,
            args.group_documents,
            args.rolling,
        )

    def samples_of(self, dataset: Any) -> MonolingualDataset | SlidingWindowDataset:
        """Lines of token ids, each with its end of line, cut into samples as the flags say."""
        if getattr(self.args, "truncate_sequence", False):
            dataset = TruncateDataset(dataset, self.args.tokens_per_sample)
        mode = self.args.sample_break_mode
        block_size = self.args.tokens_per_sample
        if block_size < 1 and mode != "eos":
            raise BadFlag("--tokens-per-sample", block_size, "at least 1")
        windows = getattr(self.args, "max_length", None) is not None
        ends_lines = getattr(self.dictionary, "ends_lines", True)
        if self.dictionary.eos() < 0 and (not windows or self.args.rolling):
            expected, remedy = "a token that stands before a text", "use --max-length, without --rolling"
            raise BadFile(self.args.data, "the text of a tokenizer that has neither BOS nor EOS", expected, remedy)
        if windows:
            return self._windows(dataset)
        sizes = getattr(dataset, "sizes", None)
        dataset = TokenBlockDataset(
            dataset,
            [len(line) for line in dataset] if sizes is None else sizes,
            block_size,
            pad=self.dictionary.pad(),
            eos=self.dictionary.eos(),
            break_mode=mode,
            include_targets=True,
            joined=not ends_lines and mode in (None, "none", "complete"),
        )
        # fairseq evaluates with --lm-eval: samples in a fixed order there, ties of length shuffled elsewhere
        return MonolingualDataset(
            dataset,
            dataset.sizes,
            self.dictionary,
            self.output_dictionary,
            add_eos_for_other_targets=mode is not None and mode != "none",
            shuffle=not getattr(self.args, "lm_eval", False),
            targets=self.targets,
            add_bos_token=getattr(self.args, "add_bos_token", False),  # absent from the oldest checkpoints
        )

    def build_dataset_for_inference(self, src_tokens: list[Tensor], src_lengths: Any) -> Any:
        """A dataset of independent lines (each ends in eos) for interactive use: every token incl. eos is a target."""
        block = TokenBlockDataset(
            src_tokens,
            [len(line) for line in src_tokens],
            None,
            pad=self.dictionary.pad(),
            eos=self.dictionary.eos(),
            break_mode="eos",
            include_targets=True,
        )
        add_bos = getattr(self.args, "add_bos_token", False)
        return MonolingualDataset(
            block, block.sizes, self.dictionary, self.dictionary, False, False, ["future"], add_bos
        )

    @property
    def source_dictionary(self) -> Dictionary:
        """Dictionary of the text."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Any:
        """Dictionary of the targets: the text's, unless `--output-dictionary-size` cut it."""
        return self.output_dictionary
