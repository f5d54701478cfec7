"""One update by hand: normalisation over micro-batches, seeds, memory running out, padding batches."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from fairseq import metrics
from fairseq.errors import UserError
from fairseq.trainer import Trainer

ARGS = {
    "cpu": True,
    "fp16": False,
    "bf16": False,
    "optimizer": "sgd",
    "lr": [1.0],
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr_scheduler": "fixed",
    "force_anneal": None,
    "lr_shrink": 0.1,
    "warmup_updates": 0,
    "seed": 7,
    "clip_norm": 0.0,
    "empty_cache_freq": 0,
}


class Task:
    """loss = sum of w * x; the sample size is the number of x."""

    def __init__(self) -> None:
        self.fail_on: set[int] = set()
        self.noise: list[float] = []

    def train_step(self, sample, model, criterion, optimizer, ignore_grad=False):
        if len(sample) in self.fail_on:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.noise.append(torch.rand(()).item())
        loss = (model.weight * sample).sum() * (0 if ignore_grad else 1)
        optimizer.backward(loss)
        return loss, len(sample), {"loss": loss.detach(), "ntokens": len(sample), "sample_size": len(sample)}

    def reduce_metrics(self, outputs, criterion) -> None:
        metrics.log_scalar("loss", sum(output["loss"] for output in outputs))


def make(**changes):
    metrics.reset()
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    task = Task()
    return Trainer(argparse.Namespace(**{**ARGS, **changes}), task, model, torch.nn.Module()), task, model


def test_gradient_is_divided_by_the_total_sample_size() -> None:
    trainer, _, model = make()
    output = trainer.train_step([torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])])
    assert model.weight.item() == pytest.approx(-(3 + 4 + 5 + 6) / 4)
    assert output["ntokens"] == 4 and trainer.get_num_updates() == 1


def test_sizes_may_be_tensors_as_on_a_gpu(monkeypatch) -> None:
    """There nothing is turned into Python numbers before a line is printed."""
    trainer, task, model = make(clip_norm=2.0)
    step = task.train_step

    def tensor_sizes(*args, **kwargs):
        loss, size, output = step(*args, **kwargs)
        size = torch.tensor(float(size), dtype=torch.float64)
        return loss, size, {**output, "ntokens": size, "sample_size": size}

    monkeypatch.setattr(task, "train_step", tensor_sizes)
    monkeypatch.setattr("fairseq.meters.detached", lambda value: value)
    output = trainer.train_step([torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])])
    assert model.weight.item() == pytest.approx(-2.0, rel=1e-6) and output["ntokens"] == 4
    assert isinstance(metrics.get_meters("default")["gnorm"].sum, torch.Tensor)
    assert metrics.get_smoothed_value("default", "gnorm") == 4.5
    state = {key: state for _, key, _, state in metrics.state_dict()["default"]}
    assert state["clip"]["val"] == 100.0 and isinstance(state["gnorm"]["sum"], float)


def test_clipping_uses_the_norm_after_normalisation() -> None:
    trainer, _, model = make(clip_norm=2.0)
    trainer.train_step([torch.tensor([10.0, 20.0])])
    assert model.weight.item() == pytest.approx(-2.0, rel=1e-6)
    default = metrics.get_meters("default")
    assert default["gnorm"].avg == pytest.approx(15.0) and default["clip"].avg == 100


def test_noise_depends_on_seed_and_update_alone() -> None:
    trainer, task, _ = make()
    for _ in range(2):
        trainer.train_step([torch.tensor([1.0])])
    torch.manual_seed(7 + 1)
    assert task.noise[1] == torch.rand(()).item() and task.noise[0] != task.noise[1]
    again, other, _ = make()
    again.set_num_updates(1)
    again.train_step([torch.tensor([1.0])])
    assert other.noise == task.noise[1:]


def test_a_batch_that_does_not_fit_is_dropped_with_what_was_before_it() -> None:
    trainer, task, model = make()
    task.fail_on = {2}
    trainer.train_step([torch.tensor([8.0]), torch.tensor([1.0, 1.0]), torch.tensor([4.0])])
    assert model.weight.item() == pytest.approx(-4.0)  # neither gradient nor size of the first batch is left
    assert metrics.get_meters("default")["oom"].avg == 1
    assert trainer.train_step([torch.tensor([1.0, 1.0])]) is None
    assert trainer.get_num_updates() == 1 and model.weight.item() == pytest.approx(-4.0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step([torch.tensor([1.0, 1.0])], raise_oom=True)


def test_padding_batches_count_nothing() -> None:
    trainer, _, model = make()
    trainer.train_step([torch.tensor([3.0]), []])
    assert model.weight.item() == pytest.approx(-3.0)


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="--fp16"):
        make(fp16=True)


def test_weights_without_gradient_are_refused() -> None:
    trainer, _, model = make()
    model.weight.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameters"):
        _ = trainer.optimizer


def test_rate_follows_the_number_of_updates() -> None:
    trainer, _, _ = make(warmup_updates=4)
    assert trainer.get_lr() == pytest.approx(0.25)
    trainer.set_num_updates(2)
    assert trainer.get_lr() == pytest.approx(0.75)
    assert SimpleNamespace(**trainer.lr_scheduler.state_dict()).best is None
