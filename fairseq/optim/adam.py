"""Adam with decoupled weight decay, in fairseq's form: epsilon is added before the bias correction."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq import utils
from fairseq.errors import BadFlag
from fairseq.flag_types import natural_float
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.fairseq_optimizer import Float32Math


@register_optimizer("adam")
class FairseqAdam(FairseqOptimizer):
    """`--optimizer adam`."""

    state_keys = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, args: argparse.Namespace, params: Iterable[Tensor]) -> None:
        super().__init__(args)
        self._optimizer = Adam(params, **self.optimizer_config)

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--adam-betas", default="(0.9, 0.999)", metavar="B", help="betas of Adam")
        parser.add_argument("--adam-eps", type=natural_float, default=1e-8, metavar="D", help="epsilon of Adam")
        parser.add_argument(
            "--weight-decay", "--wd", default=0.0, type=natural_float, metavar="WD", help="weight decay"
        )
        parser.add_argument(
            "--use-old-adam", action="store_true", help="accepted for compatibility; there is one Adam"
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": self.args.lr[0],
            "betas": parse_betas(self.args.adam_betas),
            "eps": self.args.adam_eps,
            "weight_decay": self.args.weight_decay,
        }


def parse_betas(text: Any, flag: str = "--adam-betas") -> tuple[float, float]:
    """Two numbers in [0, 1) from "(0.9, 0.999)"; a literal, nothing is evaluated."""
    betas = utils.eval_str_list(text, flag=flag) or []
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise BadFlag(flag, repr(text), "two numbers from 0 to below 1 such as '(0.9, 0.999)'")
    return betas[0], betas[1]


class Adam(Float32Math):
    """p <- p - wd lr p;  p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).

    State per parameter: `step` (int), `exp_avg`, `exp_avg_sq`, and `max_exp_avg_sq` with amsgrad."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)

    def update(
        self, group: dict[str, Any], params: list[Tensor], masters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        moments = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())
        for step, indices in by_step(self.state, params, moments).items():
            states = [self.state[params[i]] for i in indices]
            self._update(group, step, states, [masters[i] for i in indices], [gradients[i] for i in indices])

    @staticmethod
    def _update(
        group: dict[str, Any], step: int, states: list[dict[str, Any]], masters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        mean, square = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_mul_(mean, beta1)
        torch._foreach_add_(mean, gradients, alpha=1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, value=1 - beta2)
        if group["amsgrad"]:
            largest = [s["max_exp_avg_sq"] for s in states]
            torch._foreach_maximum_(largest, square)
            square = largest
        denominator = torch._foreach_sqrt(square)
        torch._foreach_add_(denominator, group["eps"])
        if group["weight_decay"] != 0:
            torch._foreach_mul_(masters, 1 - group["weight_decay"] * lr)
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        torch._foreach_addcdiv_(masters, mean, denominator, value=-size)


def by_step(states: Any, params: list[Tensor], moments: tuple[str, ...]) -> dict[int, list[int]]:
    """Increments the number of steps of each parameter; new `moments` (float32) are zero. Returns, by number of steps,
    the positions of the parameters with that number: parameters that got their first gradient later have fewer
    steps."""
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(params):
        state = states[p]
        if not state:
            state["step"] = 0
            for key in moments:
                state[key] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] = int(state["step"]) + 1
        groups.setdefault(state["step"], []).append(i)
    return groups
