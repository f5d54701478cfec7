"""Flags that several commands have: progress, device and precision, the choices of registered classes, data and
batches, and the results file."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.flag_types import any_int, natural_float, natural_int, output_file, positive_float, positive_int, seed_int
from fairseq.refusals import add_force
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

REGISTRY_TEXTS = {
    "criterion": "loss that is minimised",
    "optimizer": "optimiser",
    "lr_scheduler": "schedule of the learning rate",
    "tokenizer": "tokeniser applied to the text first (default: none)",
    "bpe": "cut words into pieces (default: do not)",
}


def add_shared_args(parser: argparse.ArgumentParser, default_task: str) -> None:
    """Flags of every program: progress, device, precision, extensions, and the registries' choices."""
    add = parser.add_argument
    add("--no-progress-bar", action="store_true", help="disable the progress bar")
    add("--log-interval", type=any_int, default=1000, metavar="N", help="log progress every N batches")
    add(
        "--log-format",
        choices=["json", "none", "simple", "tqdm"],
        help="form of progress lines (default: tqdm on a terminal, else simple)",
    )
    add("--tensorboard-logdir", default="", metavar="DIR", help="write tensorboard logs here")
    add("--seed", type=seed_int, default=1, metavar="N", help="seed of all random number generators")
    add("--cpu", action="store_true", help="use the CPU even where a GPU is at hand")
    add("--fp16", action="store_true", help="half precision (CUDA only)")
    add("--bf16", action="store_true", help="bfloat16 precision")
    add("--memory-efficient-fp16", action="store_true", help="half precision without a float32 copy of the weights")
    add("--fp16-no-flatten-grads", action="store_true", help="one float32 copy per parameter, not one in all")
    add("--fp16-init-scale", type=positive_int, default=128, help="initial loss scale")
    add(
        "--fp16-scale-window",
        type=positive_int,
        help="updates without overflow before the loss scale is doubled (default: 16384 / --update-freq)",
    )
    add(
        "--fp16-scale-tolerance",
        type=natural_float,
        default=0.0,
        metavar="SHARE",
        help="share of overflows tolerated before scaling down",
    )
    add(
        "--min-loss-scale",
        type=natural_float,
        default=1e-4,
        metavar="D",
        help="stop when the loss scale gets this small",
    )
    add("--threshold-loss-scale", type=positive_float, metavar="X", help="never let the loss scale fall below this")
    add("--user-dir", metavar="DIR", help="folder of a Python package with extensions; its code is executed")
    add("--empty-cache-freq", type=any_int, default=0, help="empty the CUDA cache every N updates (default: never)")
    add("--all-gather-list-size", type=any_int, default=16384, help="of several processes")
    for name, registry in REGISTRIES.items():
        add(
            registry.flag,
            default=registry.default,
            choices=sorted(registry.classes),
            help=REGISTRY_TEXTS.get(name, f"{name} to use"),
        )
    add("--task", metavar="TASK", default=default_task, choices=sorted(TASK_REGISTRY), help="kind of model and data")


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
    add(
        "--required-batch-size-multiple",
        default=8,
        type=positive_int,
        metavar="N",
        help="make batches of a multiple of N samples where they are larger",
    )
    add("--dataset-impl", choices=get_available_dataset_impl(), help="file format of the data (default: look)")
    if train:
        add("--train-subset", default="train", metavar="SPLIT", help="split to train on")
        add("--valid-subset", default="valid", metavar="SPLIT", help="splits to validate on, separated by commas")
        add("--validate-interval", type=positive_int, default=1, metavar="N", help="validate every N epochs")
        add(
            "--validate-interval-updates",
            type=natural_int,
            default=0,
            metavar="N",
            help="validate every N updates too (default: only at ends of epochs)",
        )
        add("--fixed-validation-seed", type=seed_int, metavar="N", help="seed used while validating (default: none)")
        add("--disable-validation", action="store_true", help="never validate")
        add(
            "--max-tokens-valid", type=positive_int, metavar="N", help="--max-tokens for validation (default: the same)"
        )
        add(
            "--max-sentences-valid",
            "--batch-size-valid",
            type=positive_int,
            metavar="N",
            help="--max-sentences for validation (default: the same)",
        )
        add("--curriculum", default=0, type=natural_int, metavar="N", help="no shuffling in the first N epochs")
    if gen:
        add("--gen-subset", default="test", metavar="SPLIT", help="split to evaluate")
        add("--num-shards", default=1, type=positive_int, metavar="N", help="number of parts the data is dealt into")
        add("--shard-id", default=0, type=natural_int, metavar="ID", help="part to evaluate")
    return group


def add_results_args(parser: argparse.ArgumentParser) -> Any:
    """A results file that a script can read."""
    group = parser.add_argument_group("Results")
    add = group.add_argument
    add("--results-json", type=output_file, metavar="FILE", help="write settings, versions, losses and times here")
    add_force(group)
    return group
