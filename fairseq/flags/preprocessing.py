"""Flags of `preprocess.py`."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.flag_types import any_int, natural_int, output_folder, positive_int
from fairseq.flags.huggingface import add_tokenizer_args
from fairseq.refusals import add_force


def add_preprocess_args(parser: argparse.ArgumentParser) -> Any:
    """Flags of `preprocess.py`."""
    group = parser.add_argument_group("Preprocessing")
    add = group.add_argument
    add("-s", "--source-lang", metavar="SRC", help="source language (default: none, as in language modelling)")
    add("-t", "--target-lang", metavar="TARGET", help="target language (default: none)")
    add("--trainpref", metavar="FP", help="training text file (its prefix, when a language is given)")
    add("--validpref", metavar="FP", help="validation text files, separated by commas")
    add("--testpref", metavar="FP", help="test text files, separated by commas")
    add("--align-suffix", metavar="FP", help="suffix of alignment files")
    add("--destdir", type=output_folder, metavar="DIR", default="data-bin", help="folder to write to")
    add("--thresholdtgt", metavar="N", default=0, type=natural_int, help="target words rarer than N become <unk>")
    add("--thresholdsrc", metavar="N", default=0, type=natural_int, help="words rarer than N become <unk>")
    add("--tgtdict", metavar="FP", help="use this target dictionary")
    add("--srcdict", metavar="FP", help="use this dictionary instead of counting the training text")
    add("--nwordstgt", metavar="N", default=-1, type=any_int, help="most target words to keep (default: all)")
    add("--nwordssrc", metavar="N", default=-1, type=any_int, help="most words to keep (default: all)")
    add("--alignfile", metavar="FILE", help="refused: dictionaries of alignments are not built here")
    add("--dataset-impl", default="mmap", choices=get_available_dataset_impl(), help="file format to write")
    add("--joined-dictionary", action="store_true", help="one dictionary for source and target")
    add("--only-source", action="store_true", help="process one language only")
    add(
        "--padding-factor",
        metavar="N",
        default=8,
        type=natural_int,
        help="pad the dictionary's size to a multiple of N",
    )
    add("--workers", metavar="N", default=1, type=positive_int, help="number of processes")
    add_tokenizer_args(group)
    add("--dict-only", action="store_true", help="only build the dictionary")
    add_force(group)
    return group
