"""NAG and Adam against the formulas of the specification, missing gradients, saved states, half precision."""

import argparse

import pytest
import torch

from fairseq import optim
from fairseq.errors import UserError
from fairseq.optim.adam import Adam
from fairseq.optim.nag import NAG


def args_for(optimizer: str, **changes) -> argparse.Namespace:
    base = {
        "optimizer": optimizer,
        "lr": [0.1],
        "momentum": 0.9,
        "weight_decay": 0.0,
        "adam_betas": "(0.9, 0.999)",
        "adam_eps": 1e-8,
        "adamax_betas": "(0.9, 0.999)",
        "adamax_eps": 1e-8,
        "fp16": False,
        "bf16": False,
        "fp16_scale_window": None,
        "fp16_init_scale": 4,
        "fp16_scale_tolerance": 0.0,
        "threshold_loss_scale": None,
        "min_loss_scale": 1e-4,
        "update_freq": [1],
        "distributed_world_size": 1,
    }
    return argparse.Namespace(**{**base, **changes})


def parameter(*values: float, dtype=torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def test_nag_check_values() -> None:
    p = parameter(1.0)
    nag = optim.build_optimizer(args_for("nag"), [p])
    for lr, expected, buffer in ((0.1, 0.905, -0.05), (0.05, 0.83725, -0.0475)):
        nag.set_lr(lr)
        p.grad = torch.tensor([0.5])
        nag.step()
        assert p.item() == pytest.approx(expected, rel=2e-7)
        assert nag.optimizer.state[p]["momentum_buffer"].item() == pytest.approx(buffer, rel=2e-7)
    group = nag.state_dict()["param_groups"][0]
    assert group == {"lr": 0.05, "lr_old": 0.05, "momentum": 0.9, "weight_decay": 0.0, "params": [0]}


def test_nag_weight_decay_and_a_rate_that_starts_at_zero() -> None:
    p = parameter(2.0)
    nag = NAG([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    p.grad = torch.tensor([0.0])
    nag.step()
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))
    nag.param_groups[0].update(lr=0.0)
    nag.step()
    nag.param_groups[0].update(lr=0.1)
    nag.step()  # the last rate was 0: no division by it
    assert torch.isfinite(p).all()


def test_adam_check_value_and_state() -> None:
    p = parameter(1.0)
    adam = optim.build_optimizer(args_for("adam", weight_decay=0.1), [p])
    p.grad = torch.tensor([0.5])
    adam.step()
    assert p.item() == pytest.approx(0.8900000632, rel=1e-7)
    state = adam.optimizer.state[p]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 1
    assert state["exp_avg"].item() == pytest.approx(0.05) and state["exp_avg_sq"].item() == pytest.approx(2.5e-4)


def test_adam_follows_the_formula_over_steps_with_different_counts() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))
    expected = {id(p): p.detach().double().clone() for p in (a, b)}
    moments = {id(p): [torch.zeros_like(p).double(), torch.zeros_like(p).double(), 0] for p in (a, b)}
    adam = Adam([a, b], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    for step in range(4):
        a.grad = torch.randn_like(a)
        b.grad = torch.randn_like(b) if step != 1 else None  # b has one step less from here on
        adam.step()
        for p in (a, b):
            if p.grad is not None:
                mean, square, t = moments[id(p)]
                t += 1
                mean = 0.8 * mean + 0.2 * p.grad
                square = 0.95 * square + 0.05 * p.grad**2
                size = 0.01 * (1 - 0.95**t) ** 0.5 / (1 - 0.8**t)
                expected[id(p)] = expected[id(p)] - size * mean / (square.sqrt() + 1e-3)
                moments[id(p)] = [mean, square, t]
    for p in (a, b):
        torch.testing.assert_close(p.double(), expected[id(p)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("corrected", [True, False])
def test_adamax_follows_the_original_formula_and_keeps_its_settings(corrected: bool) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 4))
    flags = {"adamax_betas": "(0.8, 0.95)", "adamax_eps": 1e-3, "weight_decay": 0.1}
    adamax = optim.build_optimizer(args_for("adamax", no_bias_correction=not corrected, **flags), [p])
    expected = p.detach().double().clone()
    mean = largest = torch.zeros_like(expected)
    for step in range(1, 5):
        p.grad = torch.randn_like(p) * (step != 3)  # a gradient of zero: the norm decays, epsilon is not in it
        mean, largest = 0.8 * mean + 0.2 * p.grad, torch.maximum(0.95 * largest, p.grad.double().abs())
        size = 0.1 / (1 - 0.8**step) if corrected else 0.1
        expected = expected * (1 - 0.1 * 0.1) - size * mean / (largest + 1e-3)
        adamax.step()
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
    state = adamax.state_dict()
    assert set(state["param_groups"][0]) == {"lr", "betas", "eps", "weight_decay", "bias_correction", "params"}
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_inf"} and state["state"][0]["step"] == 4


def test_a_state_of_torchs_adamax_is_gone_on_with() -> None:
    p, q = parameter(1.0), parameter(1.0)
    theirs = torch.optim.Adamax([p], lr=0.1)
    p.grad = torch.tensor([0.5])
    theirs.step()
    ours = optim.build_optimizer(args_for("adamax", adamax_betas="(0.9, 0.999)", adamax_eps=1e-8), [q])
    ours.load_state_dict(theirs.state_dict())
    q.grad = torch.tensor([0.5])
    ours.step()
    assert ours.optimizer.state[q]["step"] == 2 and torch.isfinite(q)


@pytest.mark.parametrize("text", ["(0.9,)", "0.9", "(0.9, 1.5)", "__import__('os')"])
def test_wrong_betas_are_told_in_a_sentence(text: str) -> None:
    with pytest.raises(UserError):
        optim.build_optimizer(args_for("adam", adam_betas=text), [parameter(1.0)])


def test_a_missing_gradient_counts_as_zero_once_there_was_one() -> None:
    met, never = parameter(1.0), parameter(1.0)
    nag = optim.build_optimizer(args_for("nag"), [met, never])
    met.grad = torch.tensor([1.0])
    nag.fill_missing_gradients()
    nag.step()
    after_first = met.item()
    nag.zero_grad()
    assert met.grad is None
    nag.fill_missing_gradients()
    nag.step()
    assert met.item() == pytest.approx(after_first + 0.9**2 * -0.1)  # momentum goes on
    assert never.item() == 1.0 and never.grad is None


@pytest.mark.parametrize("name", ["nag", "adam", "adamax", "sgd"])
def test_a_restored_optimiser_continues_bit_for_bit(name: str) -> None:
    torch.manual_seed(1)
    gradients = torch.randn(6, 7)

    def run(p, optimizer, steps) -> None:
        for i in steps:
            p.grad = gradients[i].clone()
            optimizer.step()

    first = torch.nn.Parameter(torch.ones(7))
    optimizer = optim.build_optimizer(args_for(name), [first])
    run(first, optimizer, range(3))
    state, weights = optimizer.state_dict(), first.detach().clone()
    second = torch.nn.Parameter(weights.clone())
    restored = optim.build_optimizer(args_for(name), [second])
    restored.load_state_dict(state)
    run(second, restored, range(3, 6))
    third = torch.nn.Parameter(torch.ones(7))
    run(third, optim.build_optimizer(args_for(name), [third]), range(6))
    assert torch.equal(second, third)


def test_overrides_replace_restored_settings() -> None:
    p = parameter(1.0)
    nag = optim.build_optimizer(args_for("nag"), [p])
    nag.load_state_dict(nag.state_dict(), {"momentum": 0.5})
    assert nag.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adadelta", "adamax"])
def test_torch_optimisers_descend(name: str) -> None:
    extra = {"adadelta_rho": 0.9, "adadelta_eps": 1e-6, "adamax_betas": "(0.9, 0.999)", "adamax_eps": 1e-8}
    p = parameter(1.0)
    optimizer = optim.build_optimizer(args_for(name, **extra), [p])
    p.grad = torch.tensor([2.0])
    optimizer.multiply_grads(0.5)
    assert p.grad.item() == 1.0
    optimizer.step()
    assert p.item() < 1.0


def test_clipping_scales_only_too_large_norms() -> None:
    p, q = parameter(0.0), parameter(0.0)
    nag = optim.build_optimizer(args_for("nag"), [p, q])
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert nag.clip_grad_norm(0.0).item() == pytest.approx(5.0) and p.grad.item() == 3.0
    assert nag.clip_grad_norm(10.0).item() == pytest.approx(5.0) and p.grad.item() == pytest.approx(3.0)
    assert nag.clip_grad_norm(0.1).item() == pytest.approx(5.0)
    assert p.grad.item() == pytest.approx(3.0 * 0.1 / (5.0 + 1e-6))
