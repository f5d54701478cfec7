"""Schedules against the check values and formulas of the specification."""

import argparse
import math

import pytest
import torch

from fairseq import optim
from fairseq.errors import UserError
from fairseq.optim import lr_scheduler
from fairseq.registry import declared_defaults


def schedule(name: str, lr=(1.0,), **flags):
    defaults = declared_defaults(lr_scheduler.LR_SCHEDULER_REGISTRY[name])
    base = {"lr_scheduler": name, "lr": list(lr), "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    common = {"max_update": 0, "min_lr": -1.0, "maximize_best_checkpoint_metric": False}
    args = argparse.Namespace(**{**common, **defaults, **base, **flags})
    optimizer = optim.build_optimizer(args, [torch.nn.Parameter(torch.zeros(1))])
    made = lr_scheduler.build_lr_scheduler(args, optimizer)
    made.step_update(0)
    return made, optimizer


RECIPE = {
    "max_lr": 1.0,
    "t_mult": 2.0,
    "lr_period_updates": 270000.0,
    "lr_shrink": 0.75,
    "warmup_updates": 16000,
    "warmup_init_lr": 1e-7,
    "max_update": 286000,
}
CHECKS = [(0, 1e-7), (8000, 0.50000005), (16000, 1.0), (151000, 0.50005), (285999, 1.0000003e-4), (286000, 0.75)]


@pytest.mark.parametrize("updates, expected", CHECKS)
def test_cosine_recipe(updates: int, expected: float) -> None:
    cosine, optimizer = schedule("cosine", lr=[1e-4], **RECIPE)
    assert cosine.step_update(updates) == pytest.approx(expected, rel=1e-7)
    assert optimizer.get_lr() == pytest.approx(expected, rel=1e-7)
    newer, _ = schedule("cosine", lr=[1.0], **{**RECIPE, "max_lr": None, "min_lr": 1e-4})
    assert newer.step_update(updates) == pytest.approx(expected, rel=1e-7)


def test_cosine_periods_double_and_shrink() -> None:
    cosine, _ = schedule("cosine", lr=[0.0], max_lr=1.0, t_mult=2.0, lr_period_updates=10.0, lr_shrink=0.5)
    assert [cosine.step_update(n) for n in (0, 5, 10, 20, 30)] == pytest.approx([1.0, 0.5, 0.5, 0.25, 0.25])
    even, _ = schedule("cosine", lr=[0.0], max_lr=1.0, max_update=10, lr_shrink=0.1)
    assert [even.step_update(n) for n in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.1])


def test_cosine_refuses_what_makes_no_sense() -> None:
    with pytest.raises(UserError, match="--max-lr"):
        schedule("cosine", lr=[1.0], max_lr=0.5, max_update=10)
    with pytest.raises(UserError, match="--lr:"):
        schedule("cosine", lr=[1.0, 0.5], max_lr=2.0, max_update=10)
    with pytest.raises(UserError, match="--lr-period-updates"):
        schedule("cosine", lr=[0.1], max_lr=2.0)


def test_inverse_sqrt() -> None:
    made, _ = schedule("inverse_sqrt", lr=[5e-4])
    assert made.step_update(0) == 0
    assert made.step_update(1000) == pytest.approx(5e-4 / 4)
    assert made.step_update(4000) == pytest.approx(5e-4)
    assert made.step_update(16000) == pytest.approx(2.5e-4)
    with pytest.raises(UserError, match="--warmup-updates"):
        schedule("inverse_sqrt", warmup_updates=0)


def test_fixed_lists_anneals_and_warms_up() -> None:
    made, _ = schedule("fixed", lr=[1.0, 0.5, 0.25], force_anneal=4, warmup_updates=4)
    assert made.step_update(0) == pytest.approx(0.25) and made.step_update(3) == 1.0 and made.step_update(9) == 1.0
    rates = [made.step(epoch) for epoch in range(1, 6)]
    assert rates == pytest.approx([0.5, 0.25, 0.25, 0.25 * 0.1, 0.25 * 0.01])


def test_polynomial_decay() -> None:
    made, _ = schedule("polynomial_decay", warmup_updates=10, total_num_update=110, end_learning_rate=0.1, power=2.0)
    assert made.step_update(0) == 0 and made.step_update(5) == 0.5 and made.step_update(10) == 1.0
    assert made.step_update(60) == pytest.approx(0.9 * 0.25 + 0.1)
    assert made.step_update(110) == made.step_update(500) == pytest.approx(0.1)


def test_plateau_shrinks_without_progress_and_survives_a_restart() -> None:
    made, optimizer = schedule("reduce_lr_on_plateau", lr=[1.0])
    made.step(1, 5.0)
    made.step(2, 4.0)
    assert optimizer.get_lr() == 1.0
    made.step(3, 4.0)
    assert optimizer.get_lr() == pytest.approx(0.1)
    other, _ = schedule("reduce_lr_on_plateau", lr=[1.0])
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == made.state_dict() and other.state_dict()["best"] == 4.0
    warm, _ = schedule("reduce_lr_on_plateau", lr=[1.0], warmup_updates=10)
    assert warm.step_update(5) == pytest.approx(0.5)


def test_triangular() -> None:
    made, _ = schedule("triangular", lr=[0.1], max_lr=1.0, lr_period_updates=100.0, lr_shrink=0.5, shrink_min=False)
    assert [made.step_update(n) for n in (0, 25, 50, 75, 100, 150)] == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1, 0.5])


def test_tri_stage() -> None:
    flags = {"warmup_steps": 10, "hold_steps": 10, "decay_steps": 100}
    made, _ = schedule("tri_stage", lr=[2.0], **flags)
    assert made.step_update(0) == pytest.approx(0.02) and made.step_update(10) == 2.0 and made.step_update(19) == 2.0
    assert made.step_update(70) == pytest.approx(2.0 * math.exp(math.log(0.01) / 2))
    assert [made.step_update(120), made.step_update(999)] == pytest.approx([0.02, 0.02])


def test_best_is_kept() -> None:
    made, _ = schedule("fixed")
    made.step(1, 3.0)
    made.step(2, 4.0)
    assert made.state_dict() == {"best": 3.0}
