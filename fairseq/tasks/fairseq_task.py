"""The base of all tasks: loads data, makes batches, builds model and criterion, and runs one training or validation
step. The names are fairseq's, so that tasks written against it can be registered here."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fairseq import criterions, metrics, models
from fairseq.data import data_utils, iterators
from fairseq.data.dictionary import Dictionary
from fairseq.errors import UserError


class FairseqTask:
    """Extend it, register it with `register_task`, and give it `setup_task` and `load_dataset`."""

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the task's flags to an argparse parser."""

    @staticmethod
    def logging_outputs_can_be_summed(criterion: Any) -> bool:
        """Whether the criterion's logging outputs of several workers may be summed."""
        return criterion.logging_outputs_can_be_summed()

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        """Reads a `dict.txt`."""
        return Dictionary.load(filename)

    @classmethod
    def setup_task(cls, args: argparse.Namespace, **kwargs: Any) -> FairseqTask:
        """Makes the task from parsed options."""
        return cls(args, **kwargs)

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.datasets: dict[str, Any] = {}
        self._epoch_iterators: dict[int, iterators.EpochBatchIterator] = {}

    def load_dataset(self, split: str, epoch: int = 0, combine: bool = False, **kwargs: Any) -> None:
        """Puts the dataset of `split` into `self.datasets`."""
        raise TypeError(f"{type(self).__name__} must define load_dataset")

    def dataset(self, split: str) -> Any:
        """The loaded dataset of `split`; KeyError when `load_dataset` was not called for it."""
        if split not in self.datasets:
            raise KeyError(f"dataset {split} is not loaded")
        return self.datasets[split]

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
        required_batch_size_multiple: int = 1,
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 0,
    ) -> iterators.EpochBatchIterator:
        """Orders, filters and batches `dataset`; the order is drawn under `seed`."""
        with data_utils.numpy_seed(seed):
            indices = dataset.ordered_indices()
        if max_positions is not None:
            indices = data_utils.filter_by_size(
                indices, dataset, max_positions, raise_exception=not ignore_invalid_inputs
            )
        batches = data_utils.batch_by_size(
            indices,
            dataset.num_tokens_vec(indices) if hasattr(dataset, "num_tokens_vec") else dataset.num_tokens,
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_batch_size_multiple=required_batch_size_multiple,
        )
        return iterators.EpochBatchIterator(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=batches,
            seed=seed,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            epoch=epoch,
        )

    def build_model(self, args: argparse.Namespace) -> Any:
        """The model that `args.arch` names."""
        return models.build_model(args, self)

    def build_criterion(self, args: argparse.Namespace) -> Any:
        """The criterion that `args.criterion` names."""
        return criterions.build_criterion(args, self)

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Called before each epoch."""

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, ignore_grad: bool = False, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Forward and backward pass of one batch.

        Returns (loss, sample_size, logging_output); with `ignore_grad` the gradient is multiplied by zero."""
        model.train()
        loss, sample_size, logging_output = criterion(model, sample)
        if ignore_grad:
            loss = loss * 0
        optimizer.backward(loss)
        return loss, sample_size, logging_output

    def valid_step(self, sample: Any, model: Any, criterion: Any) -> tuple[Any, Any, Any]:
        """Loss of one batch without gradients; same returns as `train_step`."""
        model.eval()
        with torch.no_grad():
            return criterion(model, sample)

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """Logs speed and batch sizes, then lets the criterion log its losses."""
        for key, name, priority in (("ntokens", "wpb", 180), ("nsentences", "bsz", 190)):
            if any(key in output for output in logging_outputs):
                total = sum(output.get(key, 0) for output in logging_outputs)
                metrics.log_scalar(name, total, priority=priority, round=1)
                if key == "ntokens":
                    metrics.log_speed("wps", total, priority=90, round=1)
        criterion.__class__.reduce_metrics(logging_outputs)

    def max_positions(self) -> Any:
        """The longest input that the task allows; None for no limit."""
        return None

    @property
    def source_dictionary(self) -> Dictionary:
        """Dictionary of the inputs."""
        raise UserError(f"the task {type(self).__name__} has no source dictionary")

    @property
    def target_dictionary(self) -> Dictionary:
        """Dictionary of the targets."""
        raise UserError(f"the task {type(self).__name__} has no target dictionary")
