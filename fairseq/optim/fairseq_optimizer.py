"""The interface of optimisers, which wraps a torch optimiser in `self._optimizer`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq import utils

CHUNK_ELEMENTS = 1 << 26
"""Half-precision parameters are updated through float32 copies of at most about this many elements at a time."""


class FairseqOptimizer:
    """Base class. Subclasses set `self._optimizer` in their constructor `(args, params)`, define `optimizer_config`."""

    _optimizer: torch.optim.Optimizer
    state_keys: tuple[str, ...] = ()
    """What the saved state of each parameter must have, if it has any."""
    master_params: Tensor | None = None
    """All weights in float32, where these are kept beside those in half precision."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @staticmethod
    def add_args(parser: Any) -> None:
        """Declares the optimiser's own flags."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser that does the work."""
        return self._optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Keyword arguments of the torch optimiser, from `args`."""
        raise RuntimeError(f"{type(self).__name__} does not define optimizer_config")

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Whether `step` computes in float32 for half-precision parameters."""
        return getattr(self.optimizer, "supports_memory_efficient_fp16", False)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimiser's parameter groups."""
        return self.optimizer.param_groups

    @property
    def params(self) -> Iterator[Tensor]:
        """All parameters, in order."""
        for group in self.param_groups:
            yield from group["params"]

    def get_lr(self) -> float:
        """The current learning rate."""
        return self.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of each group."""
        for group in self.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, as a checkpoint keeps it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        """Restores a state; `optimizer_overrides` then replaces settings of each group."""
        self.optimizer.load_state_dict(state_dict)
        if optimizer_overrides:
            for group in self.param_groups:
                group.update(optimizer_overrides)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the parameters' gradients."""
        loss.backward()

    def fill_missing_gradients(self) -> None:
        """Gives a zero gradient to each parameter that had none in this update but had one in an earlier update.

        This reproduces the original, which sets gradients to zero instead of dropping them: after a parameter's first
        gradient (for an adaptive-softmax cluster, that of its first target), momentum and decay change it in each
        update; before that it is not changed. Whether a parameter has had a gradient is inferred from the optimiser's
        state, so it is known after a restart too."""
        for parameter in self.params:
            if parameter.grad is None and self.optimizer.state.get(parameter):
                parameter.grad = torch.zeros_like(parameter)

    def multiply_grads(self, c: Any) -> None:
        """Multiplies each gradient by `c` (a number, or a scalar tensor so that the CPU need not wait for a GPU)."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, c)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clips the global L2 norm of the gradients; returns the norm before clipping."""
        return utils.clip_grad_norm_(self.params, max_norm)

    def step(self, closure: Any = None, scale: float | Tensor = 1.0) -> None:
        """Does one update with gradients divided by `scale`."""
        if getattr(self.optimizer, "supports_step_with_scale", False):
            self.optimizer.step(closure, scale=scale)  # type: ignore[call-overload]
        else:
            if isinstance(scale, Tensor) or scale != 1.0:
                self.multiply_grads(1.0 / scale)
            self.optimizer.step(closure)

    def zero_grad(self) -> None:
        """Drops all gradients (see `fill_missing_gradients`)."""
        self.optimizer.zero_grad(set_to_none=True)


class Float32Math(torch.optim.Optimizer):
    """A torch optimiser whose arithmetic is float32 whatever the parameters are: half-precision parameters are copied,
    updated and written back in chunks, so that no full float32 copy exists; their state is float32 throughout."""

    supports_memory_efficient_fp16 = True
    supports_step_with_scale = True

    def step(self, closure: Any = None, scale: float | Tensor = 1.0) -> Any:
        """One update with gradients divided by `scale`."""
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                for chunk in _chunks(params):
                    self._step_chunk(group, chunk, scale)
                self.finish_group(group)
        return loss

    def _step_chunk(self, group: dict[str, Any], params: list[Tensor], scale: float | Tensor) -> None:
        gradients = [p.grad.float() for p in params if p.grad is not None]
        if isinstance(scale, Tensor) or scale != 1.0:
            gradients = list(torch._foreach_mul(gradients, 1.0 / scale))
        masters = [p.data.float() for p in params]  # the parameters themselves when they are float32 already
        self.update(group, params, masters, gradients)
        if params[0].dtype != torch.float32:
            torch._foreach_copy_([p.data for p in params], masters)

    def update(
        self, group: dict[str, Any], params: list[Tensor], masters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        """Updates `masters` (float32, one per parameter) in place; state belongs to `self.state[parameter]`."""
        raise RuntimeError(f"{type(self).__name__} does not define update")

    def finish_group(self, group: dict[str, Any]) -> None:
        """Called once per group after its parameters were updated."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state. torch would cast it to the parameters' type; it is float32 here whatever they are."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], old["params"], strict=True):
                for key, value in saved.get(index, {}).items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)


def _chunks(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    if all(p.dtype == torch.float32 for p in params):
        if params:
            yield list(params)
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        by_type.setdefault(p.dtype, []).append(p)
    for group in by_type.values():
        chunk: list[Tensor] = []
        for p in group:
            chunk.append(p)
            if sum(q.numel() for q in chunk) >= CHUNK_ELEMENTS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
