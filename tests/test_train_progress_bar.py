"""The four forms of progress lines, letter by letter."""

import argparse
import json
import logging

import pytest

from fairseq import progress_bar
from fairseq.errors import MissingDependency


def bar_over(items, log_format, interval=2, **flags):
    args = argparse.Namespace(log_format=log_format, log_interval=interval, no_progress_bar=False, **flags)
    return progress_bar.build_progress_bar(args, items, epoch=3, prefix=flags.pop("prefix", None))


def lines(caplog) -> list[tuple[str, str]]:
    return [(record.name, record.getMessage()) for record in caplog.records]


def test_simple(caplog) -> None:
    caplog.set_level(logging.INFO)
    bar = bar_over(list(range(5)), "simple")
    for _ in bar:
        bar.log({"loss": 1.23456789, "lr": 1e-07}, tag="train")
    bar.print({"loss": 1.5, "num_updates": 5}, tag="train")
    assert lines(caplog) == [
        ("train", "epoch 003:      1 / 5 loss=1.23457, lr=1e-07"),
        ("train", "epoch 003:      3 / 5 loss=1.23457, lr=1e-07"),
        ("train", "epoch 003 | loss 1.5 | num_updates 5"),
    ]


def test_simple_counts_on_from_the_offset_of_a_restart(caplog) -> None:
    class Rest(list):
        offset = 3

    caplog.set_level(logging.INFO)
    bar = bar_over(Rest([0, 1]), "simple")
    shown = []
    for _ in bar:
        shown.append((bar.i, bar.due()))
    assert shown == [(3, True), (4, False)]


def test_json(caplog) -> None:
    caplog.set_level(logging.INFO)
    bar = bar_over(list(range(3)), "json")
    for _ in bar:
        bar.log({"loss": 2.0}, tag="train")
    bar.print({"loss": 2.0}, tag="valid")
    (name, inside), (valid, end) = lines(caplog)
    assert name == "train" and json.loads(inside) == {"epoch": 3, "update": 2.333, "loss": "2"}
    assert valid == "valid" and json.loads(end) == {"epoch": 3, "valid_loss": "2"}


def test_none_is_silent_and_tqdm_without_terminal_is_simple(caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    bar = bar_over([1], "none")
    assert list(bar) == [1] and not bar.due()
    bar.print({"loss": 1})
    assert lines(caplog) == []
    assert isinstance(bar_over([1], "tqdm"), progress_bar.SimpleProgressBar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = bar_over([1, 2], "tqdm")
    assert isinstance(bar, progress_bar.TqdmProgressBar) and list(bar) == [1, 2]
    bar.print({"loss": 1}, tag="train")
    assert lines(caplog) == [("train", "epoch 003 | loss 1")]


def test_tensorboard_is_an_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match="tensorboard"):
        bar_over([1], "simple", tensorboard_logdir="somewhere")
