"""The command-line surface: fairseq's parsers and flags (defaults of the 0.9 RetoMaton fork; renamed flags of later
versions are accepted as aliases), parsed in two passes so that a chosen model, task, optimiser and so on add their
own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from fairseq import criterions, optim, tasks, utils  # noqa: F401  (importing fills the registries)
from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.errors import BadFlag, UserError
from fairseq.flag_types import (
    Parser,
    any_int,
    finite_float,
    int_list,
    natural_float,
    natural_int,
    output_file,
    output_folder,
    output_name,
    positive_float,
    positive_int,
    rate_list,
    seed_int,
    unit_float,
)
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.optim import lr_scheduler  # noqa: F401
from fairseq.refusals import add_force
from fairseq.registry import REGISTRIES
from fairseq.retrieval.index.interface import add_index_arg
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.retrievers.checks import CHOICES as CHECK_CHOICES
from fairseq.tasks import TASK_REGISTRY

MAX_INT = sys.maxsize


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


def get_preprocessing_parser(default_task: str = "translation") -> argparse.ArgumentParser:
    """Parser of `preprocess.py`."""
    parser = get_parser("Preprocessing", default_task)
    add_preprocess_args(parser)
    return parser


def get_training_parser(default_task: str = "translation") -> argparse.ArgumentParser:
    """Parser of `train.py`."""
    parser = get_parser("Training", default_task)
    add_dataset_args(parser, train=True)
    add_distributed_training_args(parser)
    add_model_args(parser)
    add_optimization_args(parser)
    add_checkpoint_args(parser)
    add_results_args(parser)
    return parser


def get_eval_lm_parser(default_task: str = "language_modeling") -> argparse.ArgumentParser:
    """Parser of `eval_lm.py`."""
    parser = get_parser("Evaluation", default_task)
    add_dataset_args(parser, gen=True)
    add_eval_lm_args(parser)
    add_knn_eval_args(parser)
    add_results_args(parser)
    return parser


def get_parser(description: str, default_task: str) -> argparse.ArgumentParser:
    """The flags that every program shares."""
    # --user-dir is read first: what it registers must be among the choices below.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--user-dir")
    utils.import_user_module(early.parse_known_args()[0])

    parser = Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--no-progress-bar", action="store_true", help="disable the progress bar")
    add("--log-interval", type=any_int, default=1000, metavar="N", help="log progress every N batches")
    add("--log-format", choices=["json", "none", "simple", "tqdm"], help="form of progress lines")
    add("--tensorboard-logdir", default="", metavar="DIR", help="write tensorboard logs here")
    add("--seed", type=seed_int, default=1, metavar="N", help="seed of all random number generators")
    add("--cpu", action="store_true", help="use the CPU even where a GPU is at hand")
    add("--fp16", action="store_true", help="half precision (CUDA only)")
    add("--bf16", action="store_true", help="bfloat16 precision")
    add("--memory-efficient-fp16", action="store_true", help="half precision without a float32 copy of the weights")
    add("--fp16-no-flatten-grads", action="store_true", help="one float32 copy per parameter, not one in all")
    add("--fp16-init-scale", type=positive_int, default=128, help="initial loss scale")
    add("--fp16-scale-window", type=positive_int, help="updates without overflow before the loss scale is doubled")
    add(
        "--fp16-scale-tolerance",
        type=natural_float,
        default=0.0,
        help="share of overflows tolerated before scaling down",
    )
    add(
        "--min-loss-scale",
        type=natural_float,
        default=1e-4,
        metavar="D",
        help="stop when the loss scale gets this small",
    )
    add("--threshold-loss-scale", type=positive_float, help="never let the loss scale fall below this")
    add("--user-dir", help="folder of a Python package with extensions; its code is executed")
    add("--empty-cache-freq", type=any_int, default=0, help="empty the CUDA cache every N updates (0: never)")
    add("--all-gather-list-size", type=any_int, default=16384, help="accepted for compatibility")
    for name, registry in REGISTRIES.items():
        add(registry.flag, default=registry.default, choices=sorted(registry.classes), help=f"{name} to use")
    add("--task", metavar="TASK", default=default_task, choices=sorted(TASK_REGISTRY), help="task")
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
            "Model-specific configuration",
            argument_default=argparse.SUPPRESS,  # only what was typed appears; the architecture fills in the rest
        )
        ARCH_MODEL_REGISTRY[first.arch].add_args(group)
    if first.task not in TASK_REGISTRY:  # fairseq's default is translation, which this package leaves out
        raise BadFlag("--task", first.task, "--task " + " or ".join(sorted(TASK_REGISTRY)))
    TASK_REGISTRY[first.task].add_args(parser)
    _add_flags_of_choices(parser, first)
    if getattr(first, "strategy", None) is not None:
        RETRIEVER_REGISTRY[first.strategy].add_args(parser)

    extra: list[str] = []
    if parse_known:
        args, extra = parser.parse_known_args(words)
    else:
        args = parser.parse_args(words)
    _derive(args)
    return (args, extra) if parse_known else args


def parse_preprocessing_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses preprocess.py's words in two passes, so that the chosen tokeniser and encoder have their flags."""
    parser = get_preprocessing_parser()
    words = list(sys.argv[1:] if input_args is None else input_args)
    first, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    _add_flags_of_choices(parser, first, ("tokenizer", "bpe"))
    return parser.parse_args(words)


def _add_flags_of_choices(
    parser: argparse.ArgumentParser, first: argparse.Namespace, names: Sequence[str] | None = None
) -> None:
    """The flags of the classes that a first pass found chosen, for these registries (all)."""
    for name, registry in REGISTRIES.items():
        choice = getattr(first, name, None) if names is None or name in names else None
        if choice is not None and hasattr(registry.classes[choice], "add_args"):
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
    if getattr(args, "arch", None) in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[args.arch](args)


# ---------------------------------------------------------------------------------------------------------------------
# Flag groups


def add_preprocess_args(parser: argparse.ArgumentParser) -> Any:
    """Flags of `preprocess.py`."""
    group = parser.add_argument_group("Preprocessing")
    add = group.add_argument
    add("-s", "--source-lang", metavar="SRC", help="source language; leave out for language modelling")
    add("-t", "--target-lang", metavar="TARGET", help="target language; leave out for language modelling")
    add("--trainpref", metavar="FP", help="training text file (its prefix, when a language is given)")
    add("--validpref", metavar="FP", help="validation text files, separated by commas")
    add("--testpref", metavar="FP", help="test text files, separated by commas")
    add("--align-suffix", metavar="FP", help="suffix of alignment files")
    add("--destdir", type=output_folder, metavar="DIR", default="data-bin", help="folder to write to")
    add("--thresholdtgt", metavar="N", default=0, type=natural_int, help="target words rarer than this become <unk>")
    add("--thresholdsrc", metavar="N", default=0, type=natural_int, help="words rarer than this become <unk>")
    add("--tgtdict", metavar="FP", help="use this target dictionary")
    add("--srcdict", metavar="FP", help="use this dictionary instead of counting the training text")
    add("--nwordstgt", metavar="N", default=-1, type=any_int, help="largest number of target words to keep")
    add("--nwordssrc", metavar="N", default=-1, type=any_int, help="largest number of words to keep")
    add("--alignfile", metavar="ALIGN", help="an alignment file")
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
    add("--dict-only", action="store_true", help="only build the dictionary")
    add_force(group)
    return group


def add_dataset_args(parser: argparse.ArgumentParser, train: bool = False, gen: bool = False) -> Any:
    """Batching and data loading."""
    group = parser.add_argument_group("Dataset and data loading")
    add = group.add_argument
    add("--num-workers", default=1, type=natural_int, metavar="N", help="processes that load data")
    add(
        "--skip-invalid-size-inputs-valid-test",
        action="store_true",
        help="skip validation and test samples that are too long",
    )
    add("--max-tokens", type=positive_int, metavar="N", help="largest number of tokens in a batch")
    add("--max-sentences", "--batch-size", type=positive_int, metavar="N", help="largest number of samples in a batch")
    add("--required-batch-size-multiple", default=8, type=positive_int, metavar="N", help="round batch sizes to this")
    add("--dataset-impl", choices=get_available_dataset_impl(), help="file format of the data (default: look)")
    if train:
        add("--train-subset", default="train", metavar="SPLIT", help="split to train on")
        add("--valid-subset", default="valid", metavar="SPLIT", help="splits to validate on, separated by commas")
        add("--validate-interval", type=positive_int, default=1, metavar="N", help="validate every N epochs")
        add("--validate-interval-updates", type=natural_int, default=0, metavar="N", help="validate every N updates")
        add("--fixed-validation-seed", type=seed_int, metavar="N", help="seed used while validating")
        add("--disable-validation", action="store_true", help="never validate")
        add("--max-tokens-valid", type=positive_int, metavar="N", help="--max-tokens for validation (same)")
        add(
            "--max-sentences-valid",
            "--batch-size-valid",
            type=positive_int,
            metavar="N",
            help="--max-sentences for validation (same)",
        )
        add("--curriculum", default=0, type=natural_int, metavar="N", help="no shuffling in the first N epochs")
    if gen:
        add("--gen-subset", default="test", metavar="SPLIT", help="split to evaluate")
        add("--num-shards", default=1, type=positive_int, metavar="N", help="number of parts the data is dealt into")
        add("--shard-id", default=0, type=natural_int, metavar="ID", help="part to evaluate")
    return group


def add_distributed_training_args(parser: argparse.ArgumentParser) -> Any:
    """Distributed training."""
    group = parser.add_argument_group("Distributed training")
    add = group.add_argument
    add("--distributed-world-size", type=positive_int, default=1, help="number of processes")
    add("--distributed-rank", default=0, type=any_int, help="rank of this process")
    add("--distributed-backend", default="nccl", help="distributed backend")
    add("--distributed-init-method", help="address used to meet the other processes")
    add("--distributed-port", default=-1, type=any_int, help="port used to meet the other processes")
    add("--device-id", "--local_rank", default=0, type=any_int, help="GPU to use")
    add("--distributed-no-spawn", action="store_true", help="do not start further processes")
    add(
        "--ddp-backend",
        default="c10d",
        choices=["c10d", "no_c10d", "pytorch_ddp", "legacy_ddp"],
        help="gradient exchange; adaptive_loss needs no_c10d (also called legacy_ddp)",
    )
    add("--bucket-cap-mb", default=25, type=any_int, metavar="MB", help="bucket size of gradient exchange")
    add("--fix-batches-to-gpus", action="store_true", help="keep a batch on its GPU in every epoch")
    add("--find-unused-parameters", action="store_true", help="accepted for compatibility")
    add("--broadcast-buffers", action="store_true", help="accepted for compatibility")
    add("--fast-stat-sync", action="store_true", help="accepted for compatibility")
    return group


def add_model_args(parser: argparse.ArgumentParser) -> Any:
    """The choice of the architecture."""
    group = parser.add_argument_group("Model configuration")
    group.add_argument(
        "--arch",
        "-a",
        default="transformer_lm",
        metavar="ARCH",
        choices=sorted(ARCH_MODEL_REGISTRY),
        help="architecture",
    )
    return group


def add_optimization_args(parser: argparse.ArgumentParser) -> Any:
    """Optimisation."""
    group = parser.add_argument_group("Optimization")
    add = group.add_argument
    add("--max-epoch", "--me", default=0, type=natural_int, metavar="N", help="stop after N epochs (0: no limit)")
    add("--max-update", "--mu", default=0, type=natural_int, metavar="N", help="stop after N updates (0: no limit)")
    add(
        "--clip-norm",
        default=25.0,
        type=finite_float,
        metavar="NORM",
        help="clip gradients to this norm (0: only measure)",
    )
    add("--sentence-avg", action="store_true", help="normalise gradients by samples instead of tokens")
    add("--update-freq", default=[1], type=int_list, metavar="N1,N2,...", help="batches per update, by epoch")
    add("--lr", "--learning-rate", default=[0.25], type=rate_list, metavar="LR1,LR2,...", help="learning rates")
    add("--min-lr", default=-1.0, type=finite_float, metavar="LR", help="stop when the rate gets this small")
    add(
        "--stop-min-lr",
        type=finite_float,
        metavar="LR",
        help="newer name of --min-lr, which then is cosine's lowest rate",
    )
    add("--use-bmuf", action="store_true", help=argparse.SUPPRESS)
    add("--torch-compile", action="store_true", help="compile the model with torch.compile")
    return group


def add_checkpoint_args(parser: argparse.ArgumentParser) -> Any:
    """Saving and restoring."""
    group = parser.add_argument_group("Checkpointing")
    add = group.add_argument
    add("--save-dir", type=output_folder, metavar="DIR", default="checkpoints", help="folder for checkpoints")
    add("--restore-file", default="checkpoint_last.pt", help="checkpoint to start from")
    add("--finetune-from-model", metavar="FILE", help="start from these weights only, unless a last checkpoint exists")
    add("--reset-dataloader", action="store_true", help="do not restore the position in the data")
    add("--reset-lr-scheduler", action="store_true", help="do not restore the schedule")
    add("--reset-meters", action="store_true", help="do not restore meters")
    add("--reset-optimizer", action="store_true", help="do not restore the optimiser")
    add("--optimizer-overrides", default="{}", metavar="DICT", help="replaces optimiser settings on restoring")
    add("--save-interval", type=positive_int, default=1, metavar="N", help="save every N epochs")
    add("--save-interval-updates", type=natural_int, default=0, metavar="N", help="save and validate every N updates")
    add("--keep-interval-updates", type=any_int, default=-1, metavar="N", help="keep the last N of these")
    add("--keep-last-epochs", type=any_int, default=-1, metavar="N", help="keep the last N epoch checkpoints")
    add("--keep-best-checkpoints", type=any_int, default=-1, metavar="N", help="keep the N best checkpoints")
    add("--no-save", action="store_true", help="save nothing")
    add("--no-epoch-checkpoints", action="store_true", help="only keep the last and the best checkpoint")
    add("--no-last-checkpoints", action="store_true", help="do not keep the last checkpoint")
    add("--no-save-optimizer-state", action="store_true", help="leave the optimiser out of checkpoints")
    add("--best-checkpoint-metric", default="loss", help="quantity that decides which checkpoint is best")
    add("--maximize-best-checkpoint-metric", action="store_true", help="the largest value is best")
    add("--patience", type=any_int, default=-1, metavar="N", help="stop after more than N validations without progress")
    return group


def add_common_eval_args(group: Any) -> None:
    """Flags of every evaluating program."""
    add = group.add_argument
    add("--path", metavar="FILE", help="checkpoints, separated by colons")
    add(
        "--remove-bpe",
        "--post-process",
        nargs="?",
        const="@@ ",
        default=None,
        help="score words instead of their pieces: the marker of a piece that goes on ('@@ '), or subword_nmt, "
        "sentencepiece, gpt2, wordpiece, letter or _EOW",
    )
    add("--quiet", action="store_true", help="only print final scores")
    add("--model-overrides", default="{}", metavar="DICT", help="replaces settings stored in the checkpoint")
    add(
        "--results-path", type=output_folder, metavar="DIR",
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
        help="accepted for compatibility: the target's log-probability is computed in bounded memory anyway",
    )
    add("--lm-eval", action="store_true", default=True, help=argparse.SUPPRESS)
    return group


def add_knn_eval_args(parser: argparse.ArgumentParser) -> Any:
    """Saving and using a datastore; the task's flags name the datastore itself."""
    group = parser.add_argument_group("Retrieval")
    add = group.add_argument
    add("--knnlm", action="store_true", help="mix the LM with a distribution formed from a datastore")
    add("--save-knnlm-dstore", action="store_true", help="save keys and values of this split as a datastore")
    add("--dstore-mmap", type=output_name, metavar="PREFIX", help="prefix of the datastore to save")
    add("--knnlm-gpu", action="store_true", help="search on the GPU")
    add_index_arg(parser)
    add(
        "--index-recall",
        type=positive_int,
        metavar="N",
        help="also search exactly for N tokens, and report how much of that the index finds (recall@1 and recall@k)",
    )
    add("--members", metavar="FILE", help="clusters: a CSR pickle or the arrays that kmeans.py writes")
    add("--min-knns", type=natural_int, default=1, metavar="N", help="search when fewer entries than this were kept")
    add("--max-knns", type=positive_int, metavar="N", help="most pointers to follow (--k)")
    add("--no-pointer", action="store_true", help="kNN-LM: search for every token, follow no pointers")
    add("--local", action="store_true", help="accepted for compatibility (import order of faiss)")
    add(
        "--strategy",
        choices=sorted(RETRIEVER_REGISTRY),
        help="retrieval strategy (retomaton, or knnlm with --no-pointer)",
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
        "--save-scores", type=output_folder, metavar="DIR",
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
    add("--target-foss-subset", metavar="SPLIT", help="split on which to choose (the beginning of the evaluated one)")
    add(
        "--target-foss-tokens",
        type=positive_int,
        default=16384,
        metavar="N",
        help="about how many tokens to choose on",
    )
    return group



def add_results_args(parser: argparse.ArgumentParser) -> Any:
    """A results file that a script can read."""
    group = parser.add_argument_group("Results")
    add = group.add_argument
    add("--results-json", type=output_file, metavar="FILE", help="write settings, versions, losses and times here")
    add_force(group)
    return group
