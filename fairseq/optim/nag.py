"""Nesterov's accelerated gradient as fairseq's recipes use it: the velocity is kept in units of the last
learning rate, so a schedule may change the rate between updates without disturbing the momentum."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq.flag_types import finite_float, natural_float
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.fairseq_optimizer import Float32Math


@register_optimizer("nag")
class FairseqNAG(FairseqOptimizer):
    """`--optimizer nag`."""

    state_keys = ("momentum_buffer",)

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = NAG(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--momentum", default=0.99, type=finite_float, metavar="M", help="momentum factor")
        parser.add_argument(
            "--weight-decay", "--wd", default=0.0, type=natural_float, metavar="WD", help="weight decay"
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {"lr": self.args.lr[0], "momentum": self.args.momentum, "weight_decay": self.args.weight_decay}


class NAG(Float32Math):
    """p <- p(1 - lr wd) + mu^2 r buf - (1 + mu) lr g;  buf <- mu r buf - lr g;  r = lr / (lr of the update before).

    State per parameter: `momentum_buffer`; per group besides the settings: `lr_old`, at first the configured rate."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "lr_old": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(
        self, group: dict[str, Any], params: list[Tensor], masters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        lr, mu = group["lr"], group["momentum"]
        # a last rate of 0 (polynomial warm-up begins there) divides by zero in the original; later versions use lr
        ratio = lr / group["lr_old"] if group["lr_old"] > 0 else lr
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        if group["weight_decay"] != 0:
            torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(masters, buffers, alpha=mu * mu * ratio)
        torch._foreach_add_(masters, gradients, alpha=-(1 + mu) * lr)
        torch._foreach_mul_(buffers, mu * ratio)
        torch._foreach_add_(buffers, gradients, alpha=-lr)

    def finish_group(self, group: dict[str, Any]) -> None:
        group["lr_old"] = group["lr"]
