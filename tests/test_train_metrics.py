"""Meters and aggregators: the values that they show and save, and which aggregators receive a value."""

import pytest
import torch

from fairseq import metrics
from fairseq.meters import AverageMeter, MetersDict, StopwatchMeter, TimeMeter


@pytest.fixture(autouse=True)
def clean():
    metrics.reset()
    yield
    metrics.reset()


def test_average_weighs_values_and_shows_the_latest_without_weights() -> None:
    meter = AverageMeter(round=2)
    meter.update(1.0, 1)
    meter.update(torch.tensor(4.0), torch.tensor(2))
    assert meter.smoothed_value == 3.0
    assert meter.state_dict() == {"val": 4.0, "sum": 9.0, "count": 3, "round": 2}
    latest = AverageMeter()
    latest.update(7, 0)
    assert latest.avg == 7 and latest.state_dict()["count"] == 0


def test_meters_are_ordered_by_priority_then_insertion() -> None:
    meters = MetersDict()
    for key, priority in (("c", 30), ("a", 10), ("b1", 20), ("b0", 20), ("_hidden", 5)):
        meters.add_meter(key, AverageMeter(), priority)
        meters[key].update(1.0)
    assert list(meters.get_smoothed_values()) == ["a", "b1", "b0", "c"]


def test_states_survive_and_unknown_meters_do_not_hurt() -> None:
    metrics.log_scalar("loss", 2.0, 3, priority=10, round=3)
    metrics.log_speed("wps", 5, priority=90)
    metrics.log_derived("ppl", lambda meters: 2 ** meters["loss"].avg, priority=20)
    state = metrics.state_dict()
    assert [(p, k, c) for p, k, c, _ in state["default"]] == [(10, "loss", "AverageMeter"), (90, "wps", "TimeMeter")]
    state["default"].append((99, "mine", "SomebodysMeter", {}))
    metrics.reset()
    metrics.load_state_dict(state)
    assert metrics.get_smoothed_value("default", "loss") == 2.0
    metrics.log_scalar("loss", 6.0, 1)
    assert metrics.get_smoothed_value("default", "loss") == 3.0


def test_aggregators_hear_what_is_logged_inside_them() -> None:
    with metrics.aggregate("train") as train:
        metrics.log_scalar("loss", 1.0)
        with metrics.aggregate(new_root=True) as valid:
            metrics.log_scalar("loss", 9.0)
        metrics.log_scalar("loss", 3.0)
    metrics.log_scalar("loss", 5.0)
    assert train["loss"].avg == 2.0 and valid["loss"].avg == 9.0
    assert metrics.get_smoothed_value("default", "loss") == 3.0
    metrics.reset_meters("train")
    assert train["loss"].avg is None


def test_rates_of_lasting_aggregators_skip_the_first_calls() -> None:
    for _ in range(14):
        metrics.log_speed("wps", 100)
    assert metrics.get_meter("default", "wps").n == 300
    with metrics.aggregate(new_root=True) as temporary:
        for _ in range(3):
            metrics.log_speed("wps", 100)
    assert temporary["wps"].n == 300 and temporary["wps"].avg > 0


def test_time_and_stopwatch_states_follow_the_file_format() -> None:
    rate = TimeMeter(init=10.0, n=20, round=1)
    assert rate.smoothed_value == pytest.approx(2.0, abs=0.01)
    assert set(rate.state_dict()) == {"init", "n", "round"} and rate.state_dict()["init"] >= 10
    watch = StopwatchMeter(round=0)
    watch.start()
    watch.stop(0.0)
    assert set(watch.state_dict()) == {"sum", "n", "round"} and watch.smoothed_value == 0
