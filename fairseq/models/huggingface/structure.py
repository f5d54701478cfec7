"""Where in a model its decoder layers are, and in the last one the feed-forward block: found by what modules do.

A feed-forward block maps each position's vector to one of the same width and never looks at another position, which
tells it from attention and from recurrences; it has at least two matrices, which tells it from a norm. A mixture of
experts is such a block, whose input is what comes before routing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.errors import BadFlag

MODULE_FLAG = "--knn-module"
POSITIONS = 4
MOST_DIFFERENCE = 0.05  # relative; low precision and other shapes of products make some, another position far more


def text_config(network: Any) -> Any:
    """The configuration of the language model, also of one that sees images too."""
    return network.config.get_text_config(decoder=True)


def decoder_layers(network: Any) -> nn.ModuleList | None:
    """The list of decoder layers: as long as the configuration says, else the one with most parameters."""
    lists = [module for module in network.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    count = getattr(text_config(network), "num_hidden_layers", None)
    fitting = [layers for layers in lists if len(layers) == count] or lists
    return max(fitting, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=None)


def first_called_module(network: Any) -> Any:
    """The module below the head: the first one that the network's forward pass calls, which holds the layers."""
    calls: list[nn.Module] = []

    class Found(Exception):
        pass

    def note(module: nn.Module, args: Any) -> None:
        calls.append(module)
        raise Found

    handles = [module.register_forward_pre_hook(note) for module in network.modules() if module is not network]
    try:
        device = next(network.parameters()).device
        network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    except Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    layers = decoder_layers(network)
    if not calls or layers is None or not any(module is layers for module in calls[0].modules()):
        found = f"{type(network).__name__}, in which no module holds the layers and nothing else"
        raise BadFlag("--path", found, "a model of layers with a head on top", "this family is not supported")
    return calls[0]


def named_module(network: Any, name: str) -> nn.Module:
    """The module that `--knn-module` names; BadFlag with names that are there."""
    modules = dict(network.named_modules())
    if name in modules and name:
        return modules[name]
    layers = decoder_layers(network)
    last = "" if layers is None else next(key for key, module in modules.items() if module is layers[-1])
    some = [key for key in modules if key.startswith(last + ".") and key.count(".") == last.count(".") + 1]
    raise BadFlag(MODULE_FLAG, name, "a module of the model, such as " + ", ".join(some or list(modules)[1:9]))


def feed_forward(network: Any) -> nn.Module | None:
    """The module whose input is that of the last layer's feed-forward block, or None where there is none."""
    layers = decoder_layers(network)
    if layers is None:
        return None
    width = int(text_config(network).hidden_size)
    for module in _by_depth(layers[-1]):
        if _matrices(module) > 1 and _is_feed_forward(module, width):
            return module
    return _first_of_two_linear(layers[-1], width)


def _by_depth(layer: nn.Module) -> Iterator[nn.Module]:
    """Modules inside the layer, outer ones first."""
    waiting = deque(layer.children())
    while waiting:
        module = waiting.popleft()
        yield module
        waiting.extend(module.children())


def _matrices(module: nn.Module) -> int:
    """Parameters with two dimensions or more; one with three holds the matrices of experts."""
    return sum(parameter.dim() > 1 for parameter in module.parameters())


@torch.no_grad()
def _is_feed_forward(module: nn.Module, width: int) -> bool:
    some = next(module.parameters())
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, POSITIONS, width, generator=random).to(some.device, some.dtype)
    for residual in ((), (torch.zeros_like(inputs),)):  # in some models the block adds the residual itself
        try:
            whole = first_tensor(module(inputs, *residual))
            alone = first_tensor(module(inputs[:, 1:2], *(part[:, 1:2] for part in residual)))
        except Exception:  # noqa: BLE001, S112  (whatever it says: it does not take one vector for each position)
            continue
        if whole is None or alone is None or whole.numel() != inputs.numel() or alone.numel() != width:
            return False
        ours = whole.reshape(POSITIONS, width)[1].float()
        difference = (ours - alone.reshape(width).float()).norm() / ours.norm().clamp(min=1e-30)
        return bool(difference < MOST_DIFFERENCE)
    return False


def _first_of_two_linear(layer: nn.Module, width: int) -> nn.Module | None:
    """The first of two linear layers that stand in the layer itself (OPT): from `width` to another width and back."""
    linear = [module for module in layer.children() if isinstance(module, nn.Linear)]
    for first, second in zip(linear, linear[1:]):
        if first.in_features == second.out_features == width and first.out_features == second.in_features:
            return first
    return None


def first_tensor(value: Any) -> Tensor | None:
    """A module's output, or the first part of one that is a tuple."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None
