"""Adamax (Kingma and Ba, 2015, section 7.1) in fairseq's form, with decoupled weight decay. torch's Adamax adds epsilon
to the gradients, and the decay to the gradient, so that its steps and its saved settings differ."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq.flag_types import natural_float
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import by_step, parse_betas
from fairseq.optim.fairseq_optimizer import Float32Math


@register_optimizer("adamax")
class FairseqAdamax(FairseqOptimizer):
    """`--optimizer adamax`."""

    state_keys = ("step", "exp_avg", "exp_inf")

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = Adamax(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        add = parser.add_argument
        add("--adamax-betas", default="(0.9, 0.999)", metavar="B", help="betas of Adamax")
        add("--adamax-eps", type=natural_float, default=1e-8, metavar="D", help="epsilon of Adamax")
        add("--weight-decay", "--wd", default=0.0, type=natural_float, metavar="WD", help="weight decay")
        add("--no-bias-correction", action="store_true", help="leave out the correction of the first updates' means")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": self.args.lr[0],
            "betas": parse_betas(self.args.adamax_betas, "--adamax-betas"),
            "eps": self.args.adamax_eps,
            "weight_decay": self.args.weight_decay,
            "bias_correction": not getattr(self.args, "no_bias_correction", False),
        }


class Adamax(Float32Math):
    """p <- p - wd lr p;  p <- p - lr / (1 - b1^t) m / (u + eps), with u <- max(b2 u, |g|); without bias correction the
    fraction is lr.

    State per parameter: `step` (int), `exp_avg` (m), `exp_inf` (u)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    def update(
        self, group: dict[str, Any], params: list[Tensor], masters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for step, at in by_step(self.state, params, ("exp_avg", "exp_inf")).items():
            states, chosen = [self.state[params[i]] for i in at], [masters[i] for i in at]
            mean, largest = [s["exp_avg"] for s in states], [s["exp_inf"] for s in states]
            torch._foreach_mul_(mean, beta1)
            torch._foreach_add_(mean, [gradients[i] for i in at], alpha=1 - beta1)
            torch._foreach_mul_(largest, beta2)
            torch._foreach_maximum_(largest, torch._foreach_abs([gradients[i] for i in at]))
            if group["weight_decay"] != 0:
                torch._foreach_add_(chosen, chosen, alpha=-group["weight_decay"] * lr)
            size = lr / (1 - beta1**step) if group.get("bias_correction", True) else lr
            torch._foreach_addcdiv_(chosen, mean, torch._foreach_add(largest, group["eps"]), value=-size)
