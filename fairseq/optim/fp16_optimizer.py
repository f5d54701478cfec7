"""Training a half-precision model: float32 master weights or float32 arithmetic, and a loss scale that is adapted to
the gradients. bfloat16 needs no loss scale, and is otherwise treated in the same way."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq import optim
from fairseq.errors import BadFlag, UserError
from fairseq.optim.fairseq_optimizer import FairseqOptimizer


class DynamicLossScaler:
    """Multiplier of the loss that keeps half-precision gradients representable.

    An overflow (non-finite gradient norm) halves the scale when the share of overflows since the last change has
    reached `tolerance`, never below `threshold`; `window` updates in a row without overflow double it."""

    def __init__(
        self,
        init_scale: float = 2.0**15,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        tolerance: float = 0.0,
        threshold: float | None = None,
    ) -> None:
        self.loss_scale = float(init_scale)
        self.scale_factor, self.scale_window = scale_factor, scale_window
        self.tolerance, self.threshold = tolerance, threshold
        self._since_change = 0  # updates tried since the scale last changed
        self._overflows = 0  # overflows among them
        self._clean_run = 0  # updates since the last overflow or change upwards

    def update_scale(self, overflow: bool) -> None:
        """Records whether an update overflowed, and changes the scale when it is due."""
        self._since_change += 1
        if not overflow:
            self._clean_run += 1
            if self._clean_run >= self.scale_window:
                self._change(self.loss_scale * self.scale_factor)
            return
        self._clean_run = 0
        self._overflows += 1
        if self._overflows / self._since_change >= self.tolerance:
            lower = self.loss_scale / self.scale_factor
            self._change(lower if self.threshold is None else max(lower, self.threshold))

    def _change(self, scale: float) -> None:
        self.loss_scale = scale
        self._since_change = self._overflows = self._clean_run = 0


def scaler_from_args(args: argparse.Namespace) -> DynamicLossScaler | None:
    """The loss scaler that `args` describe; None for bfloat16, whose range needs none."""
    if getattr(args, "bf16", False):
        return None
    window = args.fp16_scale_window
    if window is None:
        if len(args.update_freq) > 1:
            raise BadFlag("--fp16-scale-window", None, "a number of updates when --update-freq is a list", "give it")
        window = max(1, int(2**14 / max(args.distributed_world_size, 1) / args.update_freq[0]))
    return DynamicLossScaler(
        init_scale=args.fp16_init_scale,
        scale_window=window,
        tolerance=args.fp16_scale_tolerance,
        threshold=args.threshold_loss_scale,
    )


class HalfPrecisionOptimizer(FairseqOptimizer):
    """The code of both variants: the wrapped optimiser, the loss scale and the handling of overflowing gradients."""

    def __init__(self, args: argparse.Namespace, params: Sequence[Tensor], wrapped: FairseqOptimizer) -> None:
        super().__init__(args)
        self.half_params, self.wrapped_optimizer = list(params), wrapped
        self.state_keys = wrapped.state_keys
        self.scaler = scaler_from_args(args)
        self.min_loss_scale = args.min_loss_scale

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.wrapped_optimizer.optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return self.wrapped_optimizer.optimizer_config

    @property
    def loss_scale(self) -> float:
        """The current multiplier of the loss."""
        return 1.0 if self.scaler is None else self.scaler.loss_scale

    def state_dict(self) -> dict[str, Any]:
        state = self.wrapped_optimizer.state_dict()
        return state if self.scaler is None else {**state, "loss_scale": self.scaler.loss_scale}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        if self.scaler is not None and "loss_scale" in state_dict:
            self.scaler.loss_scale = float(state_dict["loss_scale"])
        inner = {key: value for key, value in state_dict.items() if key != "loss_scale"}
        self.wrapped_optimizer.load_state_dict(inner, optimizer_overrides)

    def backward(self, loss: Tensor) -> None:
        loss = loss.float()
        (loss if self.scaler is None else loss * self.scaler.loss_scale).backward()

    def zero_grad(self) -> None:
        for p in self.half_params:
            p.grad = None

    def check_overflow(self, norm: Tensor) -> None:
        """Raises OverflowError when the norm is not finite: the caller skips the update, the scale has been lowered."""
        if self.scaler is None:
            return
        overflow = not math.isfinite(float(norm))  # the one place where half precision waits for the GPU
        old = self.scaler.loss_scale
        self.scaler.update_scale(overflow)
        if not overflow:
            return
        if self.scaler.loss_scale <= self.min_loss_scale:
            self.scaler.loss_scale = old
            raise UserError(
                f"--fp16: found overflowing gradients down to a loss scale of {old:g}, the smallest that "
                f"--min-loss-scale {self.min_loss_scale:g} allows, expected finite ones; the loss may explode, so "
                "lower the learning rate, clip gradients, or train with --bf16 or in float32"
            )
        raise OverflowError(f"setting loss scale to: {self.scaler.loss_scale:g}")


class FP16Optimizer(HalfPrecisionOptimizer):
    """Float32 master copy of half-precision weights; by default one flat vector in parameter order, as checkpoints of
    fairseq have it, else (`--fp16-no-flatten-grads`) one master per parameter. Missing gradients count as zero."""

    master_params: Tensor

    def __init__(self, args: argparse.Namespace, params: Sequence[Tensor], flatten: bool) -> None:
        sizes = [p.numel() for p in params]
        storage = torch.empty(sum(sizes), dtype=torch.float32, device=params[0].device)
        gradient = torch.zeros_like(storage)
        self._masters = [v.view_as(p) for v, p in zip(storage.split(sizes), params, strict=True)]
        self._gradients = [v.view_as(p) for v, p in zip(gradient.split(sizes), params, strict=True)]
        torch._foreach_copy_(self._masters, [p.data for p in params])
        self.master_params = storage
        if flatten:
            self.fp32_params = [torch.nn.Parameter(storage)]
            self.fp32_params[0].grad = gradient
        else:
            self.fp32_params = [torch.nn.Parameter(view) for view in self._masters]
            for p, view in zip(self.fp32_params, self._gradients, strict=True):
                p.grad = view
        super().__init__(args, params, optim.build_optimizer(args, self.fp32_params))
        self._synced = False

    @classmethod
    def build_optimizer(cls, args: argparse.Namespace, params: Sequence[Tensor]) -> FP16Optimizer:
        """The optimiser for `params` (half precision, float32 math)."""
        return cls(args, list(params), flatten=not getattr(args, "fp16_no_flatten_grads", False))

    def fill_missing_gradients(self) -> None:
        """Nothing to do: a missing gradient is a zero in the float32 copy."""

    def _sync_gradients(self) -> None:
        if self._synced:
            return
        have = [i for i, p in enumerate(self.half_params) if p.grad is not None]
        for i in set(range(len(self.half_params))).difference(have):
            self._gradients[i].zero_()
        views = [self._gradients[i] for i in have]
        torch._foreach_copy_(views, [self.half_params[i].grad for i in have])  # type: ignore[misc]
        if self.scaler is not None:
            torch._foreach_mul_(views, 1.0 / self.scaler.loss_scale)
        self._synced = True

    def backward(self, loss: Tensor) -> None:
        self._synced = False
        super().backward(loss)

    def multiply_grads(self, c: Any) -> None:
        self._sync_gradients()
        self.wrapped_optimizer.multiply_grads(c)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        self._sync_gradients()
        norm = self.wrapped_optimizer.clip_grad_norm(max_norm)
        self.check_overflow(norm)
        return norm

    def step(self, closure: Any = None, scale: float | Tensor = 1.0) -> None:
        self._sync_gradients()
        self.wrapped_optimizer.step(closure, scale)
        torch._foreach_copy_([p.data for p in self.half_params], self._masters)

    def zero_grad(self) -> None:
        super().zero_grad()
        self._synced = False

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's state, `loss_scale`, and the master copy, without which training would continue from
        rounded weights after a restart (as it does in fairseq, which ignores the extra key)."""
        return {**super().state_dict(), "master_params": self.master_params}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        inner = {key: value for key, value in state_dict.items() if key != "master_params"}
        super().load_state_dict(inner, optimizer_overrides)
        if "master_params" in state_dict:
            self.master_params.copy_(state_dict["master_params"])


class MemoryEfficientFP16Optimizer(HalfPrecisionOptimizer):
    """No float32 copy: the wrapped optimiser computes in float32 per parameter and writes half precision back.

    Gradients stay as they are; normalising, unscaling and clipping are one multiplier, applied in float32 by the step,
    so that small gradients are not rounded to zero on the way."""

    def __init__(self, args: argparse.Namespace, params: Sequence[Tensor]) -> None:
        wrapped = optim.build_optimizer(args, params)
        if not wrapped.supports_memory_efficient_fp16:
            raise BadFlag("--memory-efficient-fp16", f"--optimizer {args.optimizer}", "nag, adam, adamax", "use --fp16")
        super().__init__(args, params, wrapped)
        self._multiplier: Any = 1.0

    @classmethod
    def build_optimizer(cls, args: argparse.Namespace, params: Sequence[Tensor]) -> MemoryEfficientFP16Optimizer:
        """The optimiser for `params` (half precision)."""
        return cls(args, list(params))

    @property
    def params(self) -> Iterator[Tensor]:
        return iter(self.half_params)

    def multiply_grads(self, c: Any) -> None:
        self._multiplier = self._multiplier * c

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        gradients = [p.grad for p in self.half_params if p.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.stack(list(norms)).norm() * (self._multiplier / self.loss_scale)
        self.check_overflow(norm)
        if max_norm > 0:
            self._multiplier = self._multiplier * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def backward(self, loss: Tensor) -> None:
        self._backward_scale = self.loss_scale
        super().backward(loss)

    def step(self, closure: Any = None, scale: float | Tensor = 1.0) -> None:
        self.wrapped_optimizer.step(closure, scale * self._backward_scale / self._multiplier)
        self._multiplier = 1.0

    def zero_grad(self) -> None:
        super().zero_grad()
        self._multiplier = 1.0


def half_precision_dtype(args: argparse.Namespace) -> torch.dtype:
    """The type the model's weights take: float16, bfloat16 or float32."""
    if getattr(args, "fp16", False):
        return torch.float16
    return torch.bfloat16 if getattr(args, "bf16", False) else torch.float32


def unique_parameters(*modules: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Trainable parameters of the modules, in order, tied ones once."""
    found = itertools.chain.from_iterable(module.parameters() for module in modules)
    return list({id(p): p for p in found if p.requires_grad}.values())
