"""Optimisers that are torch's own under fairseq's names and flags: sgd, adagrad, adadelta."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq.flag_types import natural_float, unit_float
from fairseq.optim import FairseqOptimizer, register_optimizer


def _weight_decay(parser: Any) -> None:
    parser.add_argument("--weight-decay", "--wd", default=0.0, type=natural_float, metavar="WD", help="weight decay")


@register_optimizer("sgd")
class SGD(FairseqOptimizer):
    """`--optimizer sgd`."""

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = torch.optim.SGD(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--momentum", default=0.0, type=natural_float, metavar="M", help="momentum factor")
        _weight_decay(parser)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {"lr": self.args.lr[0], "momentum": self.args.momentum, "weight_decay": self.args.weight_decay}


@register_optimizer("adagrad")
class Adagrad(FairseqOptimizer):
    """`--optimizer adagrad`."""

    state_keys = ("step", "sum")

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = torch.optim.Adagrad(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        _weight_decay(parser)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {"lr": self.args.lr[0], "weight_decay": self.args.weight_decay}


@register_optimizer("adadelta")
class Adadelta(FairseqOptimizer):
    """`--optimizer adadelta`."""

    state_keys = ("step", "square_avg", "acc_delta")

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = torch.optim.Adadelta(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--adadelta-rho", type=unit_float, default=0.9, metavar="RHO", help="decay of the average")
        parser.add_argument(
            "--adadelta-eps", type=natural_float, default=1e-6, metavar="EPS", help="term for stability"
        )
        _weight_decay(parser)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": self.args.lr[0],
            "rho": self.args.adadelta_rho,
            "eps": self.args.adadelta_eps,
            "weight_decay": self.args.weight_decay,
        }
