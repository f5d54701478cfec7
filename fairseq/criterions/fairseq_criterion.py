"""The interface of losses, and the code that the losses here have in common."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn

from fairseq import metrics

LoggingOutput = dict[str, Any]
LossResult = tuple[Tensor, Any, LoggingOutput]


class FairseqCriterion(nn.Module):
    """Base class. `forward(model, sample, reduce)` returns (loss, sample_size, logging_output): the loss is a sum in
    nats, sample_size the divisor of its gradient. Sizes may be scalar tensors, so that the CPU need not wait for a
    GPU."""

    def __init__(self, args: argparse.Namespace, task: Any) -> None:
        super().__init__()
        self.args, self.task = args, task
        dictionary = getattr(task, "target_dictionary", None)
        self.padding_idx: int = dictionary.pad() if dictionary is not None else -100

    @staticmethod
    def add_args(parser: Any) -> None:
        """Declares the criterion's own flags."""

    @classmethod
    def build_criterion(cls, args: argparse.Namespace, task: Any) -> FairseqCriterion:
        """The criterion that `args` describes."""
        return cls(args, task)

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> LossResult:
        """The loss of a batch, summed (`reduce`) or per target."""
        raise RuntimeError(f"{type(self).__name__} does not define forward")

    def result(self, loss: Tensor, sample: dict[str, Any], ntokens: Any, **more: Any) -> LossResult:
        """Puts a loss together with the counts of the batch; gradients are averaged over tokens or (`--sentence-avg`)
        sentences."""
        nsentences = sample["target"].size(0)
        sample_size = nsentences if self.args.sentence_avg else ntokens
        output = {"loss": loss.detach(), "ntokens": ntokens, "nsentences": nsentences, "sample_size": sample_size}
        return loss, sample_size, {**output, **{key: value.detach() for key, value in more.items()}}

    @staticmethod
    def reduce_metrics(logging_outputs: list[LoggingOutput]) -> None:
        """Logs the mean loss of several batches in bits, nll_loss per token where that differs, and the perplexity."""
        loss, ntokens, sample_size = (total(logging_outputs, key) for key in ("loss", "ntokens", "sample_size"))
        metrics.log_scalar("loss", loss / sample_size / math.log(2), sample_size, round=3)
        by_token = "nll_loss" if any("nll_loss" in output for output in logging_outputs) else None
        nll = total(logging_outputs, by_token) if by_token else loss
        # sizes on a GPU cannot be compared without waiting for it; then they are the same tensor or not
        if by_token or not _same(logging_outputs):
            metrics.log_scalar("nll_loss", nll / ntokens / math.log(2), ntokens, round=3)
            metrics.log_derived("ppl", lambda meters: perplexity(meters["nll_loss"].avg))
        else:
            metrics.log_derived("ppl", lambda meters: perplexity(meters["loss"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Whether workers may add up their logging outputs before `reduce_metrics`."""
        return True


def total(logging_outputs: list[LoggingOutput], key: str) -> Any:
    """The sum of one quantity over batches."""
    return sum(output.get(key, 0) for output in logging_outputs)


def _same(logging_outputs: list[LoggingOutput]) -> bool:
    for output in logging_outputs:
        size, tokens = output["sample_size"], output["ntokens"]
        if size is not tokens and (isinstance(size, Tensor) or isinstance(tokens, Tensor) or size != tokens):
            return False
    return True


def perplexity(bits: float) -> float:
    """2 ** bits to two decimals; infinity where that is too large for a float."""
    try:
        return round(2**bits, 2)
    except OverflowError:
        return math.inf


def count_tokens(target: Tensor, padding_idx: int) -> Any:
    """How many targets are not padding: a number on the CPU, a scalar tensor elsewhere."""
    count = target.ne(padding_idx).sum()
    return int(count) if target.device.type == "cpu" else count.to(torch.float64)
