"""Loss scale, master copies and float32 arithmetic for half-precision weights (on the CPU)."""

import argparse

import pytest
import torch

from fairseq import optim
from fairseq.errors import UserError
from fairseq.optim.fp16_optimizer import DynamicLossScaler, FP16Optimizer, MemoryEfficientFP16Optimizer

ARGS = {
    "optimizer": "nag",
    "lr": [0.1],
    "momentum": 0.9,
    "weight_decay": 0.0,
    "fp16": True,
    "bf16": False,
    "fp16_scale_window": None,
    "fp16_init_scale": 64,
    "fp16_scale_tolerance": 0.0,
    "threshold_loss_scale": None,
    "min_loss_scale": 1e-4,
    "update_freq": [1],
    "distributed_world_size": 1,
    "fp16_no_flatten_grads": False,
}


def args_with(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**ARGS, **changes})


def half_params(dtype=torch.float16) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(4, 3).to(dtype)), torch.nn.Parameter(torch.randn(5).to(dtype))]


def run_updates(optimizer, params, updates: int = 4) -> None:
    for _ in range(updates):
        optimizer.zero_grad()
        optimizer.backward(sum(p.float().pow(2).sum() for p in params))
        optimizer.multiply_grads(0.5)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()


def test_scale_halves_on_overflow_and_doubles_after_a_clean_window() -> None:
    scaler = DynamicLossScaler(init_scale=16, scale_window=3)
    scaler.update_scale(True)
    assert scaler.loss_scale == 8
    for _ in range(3):
        scaler.update_scale(False)
    assert scaler.loss_scale == 16


def test_tolerance_and_threshold_hold_the_scale_up() -> None:
    scaler = DynamicLossScaler(init_scale=16, scale_window=100, tolerance=0.5)
    for overflow in (False, False, False, True):
        scaler.update_scale(overflow)
    assert scaler.loss_scale == 16  # one overflow in four updates
    bounded = DynamicLossScaler(init_scale=16, threshold=16)
    bounded.update_scale(True)
    assert bounded.loss_scale == 16


def test_default_window_follows_from_the_update_frequency() -> None:
    optimizer = FP16Optimizer.build_optimizer(args_with(update_freq=[4]), half_params())
    assert optimizer.scaler.scale_window == 2**14 // 4
    with pytest.raises(UserError, match="--fp16-scale-window"):
        FP16Optimizer.build_optimizer(args_with(update_freq=[4, 2]), half_params())


@pytest.mark.parametrize("flat", [True, False])
def test_masters_follow_a_float32_run(flat: bool) -> None:
    params = half_params()
    reference = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = FP16Optimizer.build_optimizer(args_with(fp16_no_flatten_grads=not flat), params)
    plain = optim.build_optimizer(args_with(), reference)
    assert len(optimizer.fp32_params) == (1 if flat else 2)
    run_updates(optimizer, params)
    run_updates(plain, reference)
    for p, r in zip(params, reference):
        torch.testing.assert_close(p.float(), r, rtol=5e-3, atol=5e-3)
    assert len(optimizer.state_dict()["state"]) == len(optimizer.fp32_params)
    assert optimizer.state_dict()["loss_scale"] == 64.0


def test_memory_efficient_variant_keeps_float32_state_and_follows_too() -> None:
    params = half_params()
    reference = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = MemoryEfficientFP16Optimizer.build_optimizer(args_with(memory_efficient_fp16=True), params)
    run_updates(optimizer, params)
    run_updates(optim.build_optimizer(args_with(), reference), reference)
    for p, r in zip(params, reference):
        torch.testing.assert_close(p.float(), r, rtol=1e-2, atol=1e-2)
        assert optimizer.optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    restored = MemoryEfficientFP16Optimizer.build_optimizer(args_with(memory_efficient_fp16=True), half_params())
    restored.load_state_dict(optimizer.state_dict())
    assert all(s["momentum_buffer"].dtype == torch.float32 for s in restored.optimizer.state.values())
    with pytest.raises(UserError, match="--memory-efficient-fp16"):
        MemoryEfficientFP16Optimizer.build_optimizer(args_with(optimizer="sgd"), half_params())


def test_bfloat16_needs_no_scale_and_restores_its_masters() -> None:
    args = args_with(fp16=False, bf16=True)
    params = half_params(torch.bfloat16)
    optimizer = FP16Optimizer.build_optimizer(args, params)
    run_updates(optimizer, params)
    state = optimizer.state_dict()
    assert optimizer.scaler is None and "loss_scale" not in state
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = FP16Optimizer.build_optimizer(args, copies)
    restored.load_state_dict({key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()})
    run_updates(optimizer, params, 2)
    run_updates(restored, copies, 2)
    assert all(torch.equal(p, c) for p, c in zip(params, copies))


def test_overflow_lowers_the_scale_until_the_smallest() -> None:
    params = half_params()
    optimizer = FP16Optimizer.build_optimizer(args_with(fp16_init_scale=4, min_loss_scale=1.0), params)
    for expected in (2.0, None):
        optimizer.zero_grad()
        optimizer.backward(params[0].float().sum() * float("inf"))
        if expected is None:
            with pytest.raises(UserError, match="--min-loss-scale"):
                optimizer.clip_grad_norm(1.0)
        else:
            with pytest.raises(OverflowError):
                optimizer.clip_grad_norm(1.0)
            assert optimizer.loss_scale == expected
