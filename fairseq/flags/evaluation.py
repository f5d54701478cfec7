"""Flags of `eval_lm.py`: scoring a text, and retrieval."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fairseq.flag_types import natural_int, output_folder, output_name, positive_float, positive_int, unit_float
from fairseq.flags.huggingface import add_huggingface_args, add_window_args
from fairseq.retrieval.index.interface import add_index_arg
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.retrievers.checks import CHOICES as CHECK_CHOICES

MAX_INT = sys.maxsize


def add_common_eval_args(group: Any) -> None:
    """Flags of every evaluating program."""
    add = group.add_argument
    add("--path", metavar="MODEL", help="checkpoints, or Hugging Face models (folders, Hub names), separated by colons")
    add(
        "--remove-bpe",
        "--post-process",
        nargs="?",
        const="@@ ",
        metavar="MARK",
        default=None,
        help="score words instead of their pieces: the marker of a piece that goes on ('@@ ' without MARK), or "
        "subword_nmt, sentencepiece, gpt2, wordpiece, letter or _EOW",
    )
    add("--quiet", action="store_true", help="nothing but the log is printed anyway")
    add("--model-overrides", default="{}", metavar="DICT", help="replaces settings stored in the checkpoint")
    add(
        "--results-path",
        type=output_folder,
        metavar="DIR",
        help="folder that also receives the evaluation's log as a file",
    )


def add_eval_lm_args(parser: argparse.ArgumentParser) -> Any:
    """Flags of `eval_lm.py`."""
    group = parser.add_argument_group("LM evaluation")
    add_common_eval_args(group)
    add = group.add_argument
    add("--output-word-probs", action="store_true", help="log the words and their log-probabilities")
    add("--output-word-stats", action="store_true", help="log statistics per word")
    add("--context-window", default=0, type=natural_int, metavar="N", help="least context of each token, in tokens")
    add(
        "--softmax-batch",
        default=MAX_INT,
        type=positive_int,
        metavar="N",
        help="memory is bounded anyway",
    )
    add("--lm-eval", action="store_true", default=True, help=argparse.SUPPRESS)
    return group


def add_knn_eval_args(parser: argparse.ArgumentParser) -> Any:
    """Saving and using a datastore; the task's flags name the datastore itself."""
    group = parser.add_argument_group("Retrieval")
    add = group.add_argument
    add("--knnlm", action="store_true", help="mix the LM with a distribution formed from a datastore")
    add("--save-knnlm-dstore", action="store_true", help="save keys and values of this split as a datastore")
    add("--dstore-dir", metavar="DIR", help="folder of knn-transformers' files: datastore, index, clusters")
    add("--dstore-mmap", type=output_name, metavar="PREFIX", help="prefix of the datastore to save")
    add("--knnlm-gpu", action="store_true", help="search on the GPU")
    add_index_arg(parser)
    add_huggingface_args(parser)
    add_window_args(parser)
    add(
        "--index-recall",
        type=positive_int,
        metavar="N",
        help="also search exactly for N tokens, and report how much of that the index finds (recall@1 and recall@k)",
    )
    add("--members", metavar="FILE", help="clusters: a CSR pickle or the arrays that kmeans.py writes")
    add("--min-knns", type=natural_int, default=1, metavar="N", help="search when fewer entries than this were kept")
    add("--max-knns", type=positive_int, metavar="N", help="most pointers to follow (default: --k)")
    add("--no-pointer", action="store_true", help="kNN-LM: search for every token, follow no pointers")
    add(
        "--tie-order",
        choices=("original", "stable"),
        default="original",
        help="entries with equal scores: as the original sorts them, or as they came in (knn-transformers)",
    )
    add("--local", action="store_true", help="faiss needs no other order of imports")
    add(
        "--strategy",
        choices=sorted(RETRIEVER_REGISTRY),
        help="retrieval strategy (default: retomaton, or knnlm with --no-pointer)",
    )
    add(
        "--check-strategy",
        choices=CHECK_CHOICES,
        default="auto",
        help="check what the strategy returns at each step: auto checks strategies from --user-dir",
    )
    add("--knn-temp", type=positive_float, default=1.0, metavar="T", help="temperature of the retrieval distribution")
    add(
        "--lockstep-tokens",
        type=positive_int,
        default=65536,
        metavar="N",
        help="tokens whose sequences advance together; changes memory and speed, never results",
    )
    add("--dstore-weights", action="store_true", help="the datastore is merged: PREFIX_weights.npy counts its entries")
    add(
        "--save-scores",
        type=output_folder,
        metavar="DIR",
        help="keep queries, targets and LM log-probabilities here, for fairseq-sweep",
    )
    add("--save-searches", action="store_true", help="with --save-scores and --knnlm: keep all neighbours too")
    add("--save-features", action="store_true", help="with --save-scores: keep what fairseq-adaptret learns from too")
    add("--check", action="store_true", help="say what is wrong or suspicious about the files instead (fairseq-doctor)")
    add(
        "--target-foss",
        type=unit_float,
        metavar="F",
        help="share of searches to save: the strategy's own threshold, or --min-knns, is chosen for it",
    )
    add(
        "--target-foss-subset",
        metavar="SPLIT",
        help="split on which to choose (default: the beginning of the evaluated one)",
    )
    add(
        "--target-foss-tokens",
        type=positive_int,
        default=16384,
        metavar="N",
        help="about how many tokens to choose on",
    )
    return group
