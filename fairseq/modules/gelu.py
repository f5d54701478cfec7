"""Activation functions of the feed-forward sublayer, chosen by `--activation-fn`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq.errors import BadFlag


def gelu(x: Tensor) -> Tensor:
    """Exact GELU x * Phi(x), evaluated in float32 and returned in the type of `x`."""
    return F.gelu(x.float()).type_as(x)


def gelu_accurate(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (constants sqrt(2/pi) and 0.044715)."""
    return F.gelu(x, approximate="tanh")


def linear(x: Tensor) -> Tensor:
    """No activation."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": gelu,
    "gelu_fast": gelu_accurate,  # the older name of gelu_accurate
    "gelu_accurate": gelu_accurate,
    "tanh": torch.tanh,
    "linear": linear,
}


def get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    """The function named by `--activation-fn`; BadFlag for an unknown name."""
    if activation not in ACTIVATIONS:
        raise BadFlag("--activation-fn", activation, "one of " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[activation]
