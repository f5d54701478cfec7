"""The command-line surface: fairseq's parsers and flags (defaults of the 0.9 RetoMaton fork; renamed flags of later
versions are accepted as aliases), parsed in two passes so that a chosen model, task, optimiser and so on add their
own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq import criterions, optim, tasks, utils  # noqa: F401  (importing fills the registries)
from fairseq.errors import BadFlag, UserError
from fairseq.flag_help import Layout, flags_under, title_of_choice
from fairseq.flag_types import NO_LAYOUT, Parser
from fairseq.flags.evaluation import MAX_INT, add_common_eval_args, add_eval_lm_args, add_knn_eval_args
from fairseq.flags.generation import add_generation_args, add_interactive_args
from fairseq.flags.layouts import EVALUATION, INTERACTIVE, PREPROCESSING, TRAINING
from fairseq.flags.preprocessing import add_preprocess_args
from fairseq.flags.shared import add_dataset_args, add_results_args, add_shared_args
from fairseq.flags.training import (
    add_checkpoint_args,
    add_distributed_training_args,
    add_model_args,
    add_optimization_args,
)
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.optim import lr_scheduler  # noqa: F401
from fairseq.registry import REGISTRIES
from fairseq.retrieval.datastore.peer_files import name_peer_files
from fairseq.retrieval.flag_conflicts import flag
from fairseq.retrieval.index.interface import named_index
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.tasks import TASK_REGISTRY

__all__ = [
    "MAX_INT",
    "add_checkpoint_args",
    "add_common_eval_args",
    "add_dataset_args",
    "add_distributed_training_args",
    "add_generation_args",
    "add_interactive_args",
    "add_eval_lm_args",
    "add_knn_eval_args",
    "add_model_args",
    "add_optimization_args",
    "add_preprocess_args",
    "add_results_args",
    "get_eval_lm_parser",
    "get_interactive_parser",
    "get_parser",
    "get_preprocessing_parser",
    "get_training_parser",
    "parse_args_and_arch",
    "parse_preprocessing_args",
]

PREPROCESSES = "Counts the words of texts, writes their dictionary, and the texts as files of numbers."
TRAINS = """Trains a language model on what preprocess.py wrote, validates, and saves checkpoints. Interrupted and
started again with the same command it goes on."""
EVALUATES = """Evaluates a language model on a text, alone or with retrieval from a datastore (--knnlm), or saves a
datastore of the text (--save-knnlm-dstore)."""
CONTINUES = """Continues prompts, a line each, with a language model, alone or with retrieval from a datastore
(--knnlm): by the likeliest tokens, by beam search or by sampling."""


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


def get_preprocessing_parser(default_task: str = "translation") -> argparse.ArgumentParser:
    """Parser of `preprocess.py`."""
    parser = get_parser(PREPROCESSES, default_task, PREPROCESSING)
    add_preprocess_args(parser)
    return parser


def get_training_parser(default_task: str = "translation") -> argparse.ArgumentParser:
    """Parser of `train.py`."""
    parser = get_parser(TRAINS, default_task, TRAINING)
    add_dataset_args(parser, train=True)
    add_distributed_training_args(parser)
    add_model_args(parser)
    add_optimization_args(parser)
    add_checkpoint_args(parser)
    add_results_args(parser)
    return parser


def get_eval_lm_parser(default_task: str = "language_modeling") -> argparse.ArgumentParser:
    """Parser of `eval_lm.py`."""
    parser = get_parser(EVALUATES, default_task, EVALUATION)
    add_dataset_args(parser, gen=True)
    add_eval_lm_args(parser)
    add_knn_eval_args(parser)
    add_results_args(parser)
    return parser


def get_interactive_parser(default_task: str = "language_modeling") -> argparse.ArgumentParser:
    """Parser of `fairseq-interactive`."""
    parser = get_parser(CONTINUES, default_task, INTERACTIVE)
    add_dataset_args(parser, gen=True)
    add_eval_lm_args(parser)
    add_knn_eval_args(parser)
    add_generation_args(parser)
    add_interactive_args(parser)
    add_results_args(parser)
    return parser


def get_parser(description: str, default_task: str, layout: Layout = NO_LAYOUT) -> argparse.ArgumentParser:
    """The flags that every program shares."""
    # --user-dir is read first: what it registers must be among the choices below.
    _import_extensions()

    parser = Parser(description=description, layout=layout)
    add_shared_args(parser, default_task)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


def parse_args_and_arch(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str] | None = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
) -> Any:
    """Parses in two passes and lets the architecture fill in what the user left out.

    Returns the Namespace, or (Namespace, unknown words) with `parse_known`. With `suppress_defaults` only what was
    typed is in the Namespace."""
    if suppress_defaults:
        full = parse_args_and_arch(parser, input_args, parse_known=False)
        bare = argparse.ArgumentParser(parents=[parser], add_help=False, argument_default=None)
        bare.set_defaults(**dict.fromkeys(vars(full), None))
        typed = bare.parse_known_args(input_args)[0]
        return argparse.Namespace(**{key: value for key, value in vars(typed).items() if value is not None})

    words = list(sys.argv[1:] if input_args is None else input_args)
    asks_for_help = bool({"-h", "--help"} & set(words))
    first, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    if asks_for_help and first.task not in TASK_REGISTRY:
        first.task = next(iter(TASK_REGISTRY))  # fairseq's default, translation, has no help here

    if hasattr(first, "arch") and first.arch in ARCH_MODEL_REGISTRY:
        group = parser.add_argument_group(
            title_of_choice("--arch", first.arch),
            argument_default=argparse.SUPPRESS,  # only what was typed appears; the architecture fills in the rest
        )
        ARCH_MODEL_REGISTRY[first.arch].add_args(group)
    if first.task not in TASK_REGISTRY:  # fairseq's default is translation, which this package leaves out
        raise BadFlag("--task", first.task, "--task " + " or ".join(sorted(TASK_REGISTRY)))
    with flags_under(parser, title_of_choice("--task", first.task)):
        TASK_REGISTRY[first.task].add_args(parser)
    _add_flags_of_choices(parser, first)
    if getattr(first, "strategy", None) is not None:
        with flags_under(parser, title_of_choice("--strategy", first.strategy)):
            RETRIEVER_REGISTRY[first.strategy].add_args(parser)
    _add_index_flags(parser, getattr(first, "index", None))

    extra: list[str] = []
    if parse_known:
        args, extra = parser.parse_known_args(words)
    else:
        args = parser.parse_args(words)
    _derive(args)
    return (args, extra) if parse_known else args


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as a command line: True gives the bare flag, None and False give nothing."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        words.append(flag(name))
        if value is not True:
            words.append(str(value))
    return words


def parse_preprocessing_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses preprocess.py's words in two passes, so that the chosen tokeniser and encoder have their flags."""
    parser = get_preprocessing_parser()
    words = list(sys.argv[1:] if input_args is None else input_args)
    first, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    _add_flags_of_choices(parser, first, ("tokenizer", "bpe"))
    return parser.parse_args(words)


def parse_with_extensions(parser: argparse.ArgumentParser, input_args: Sequence[str] | None = None) -> Any:
    """Parses a retrieval command's words after `--user-dir` is imported, with the flags of the index that `--index`
    names."""
    words = list(sys.argv[1:] if input_args is None else input_args)
    _import_extensions(words)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--index")
    _add_index_flags(parser, early.parse_known_args(words)[0].index)
    return parser.parse_args(words)


def _import_extensions(input_args: Sequence[str] | None = None) -> None:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--user-dir")
    utils.import_user_module(early.parse_known_args(input_args)[0])


def _add_index_flags(parser: argparse.ArgumentParser, name: str | None) -> None:
    if name is not None and hasattr(named_index(name), "add_args"):
        with flags_under(parser, title_of_choice("--index", name)):
            named_index(name).add_args(parser)


def _add_flags_of_choices(
    parser: argparse.ArgumentParser, first: argparse.Namespace, names: Sequence[str] | None = None
) -> None:
    """The flags of the classes that a first pass found chosen, for these registries (all)."""
    for name, registry in REGISTRIES.items():
        choice = getattr(first, name, None) if names is None or name in names else None
        if choice is not None and hasattr(registry.classes[choice], "add_args"):
            with flags_under(parser, title_of_choice(registry.flag, choice)):
                registry.classes[choice].add_args(parser)


def _derive(args: argparse.Namespace) -> None:
    """Values that follow from others, and checks that no single flag's type can make."""
    if hasattr(args, "max_sentences_valid") and args.max_sentences_valid is None:
        args.max_sentences_valid = args.max_sentences
    if hasattr(args, "max_tokens_valid") and args.max_tokens_valid is None:
        args.max_tokens_valid = args.max_tokens
    if getattr(args, "memory_efficient_fp16", False):
        args.fp16 = True
    if getattr(args, "fp16", False) and getattr(args, "bf16", False):
        raise UserError("--fp16 and --bf16: found both, expected at most one; drop one of them")
    if getattr(args, "dstore_dir", None) is not None:
        name_peer_files(args)
    if getattr(args, "arch", None) in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[args.arch](args)
