"""Named aggregators of meters: values logged inside `with aggregate("train"):` are added to every open aggregator.

The trainer keeps "default" (always open) and "train" (reset each epoch); a validation opens a fresh root so that its
numbers do not mix with training's. Checkpoints store `state_dict()`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from fairseq.meters import AverageMeter, DerivedMeter, Meter, MetersDict, StopwatchMeter, TimeMeter

SPEED_WARMUP = 10
"""Calls that a rate of a lasting aggregator ignores before its clock starts, so that start-up costs do not show."""

_aggregators: dict[str, MetersDict] = {}
_active: list[MetersDict] = []


def reset() -> None:
    """Removes all aggregators."""
    _aggregators.clear()
    _active.clear()
    _aggregators["default"] = MetersDict()
    _active.append(_aggregators["default"])


@contextlib.contextmanager
def aggregate(name: str | None = None, new_root: bool = False) -> Iterator[MetersDict]:
    """Opens an aggregator: the lasting one called `name`, or a temporary one. `new_root` closes others meanwhile."""
    meters = MetersDict() if name is None else _aggregators.setdefault(name, MetersDict())
    outside = list(_active)
    if new_root:
        _active.clear()
    if not any(meters is open_one for open_one in _active):
        _active.append(meters)
    try:
        yield meters
    finally:
        _active[:] = outside


def _meters(key: str, make: Callable[[], Meter], priority: int) -> Iterator[tuple[MetersDict, Any]]:
    for aggregator in _active:
        if key not in aggregator:
            aggregator.add_meter(key, make(), priority)
        yield aggregator, aggregator[key]


def log_scalar(key: str, value: Any, weight: Any = 1, priority: int = 10, round: int | None = None) -> None:  # noqa: A002
    """Adds `value` with `weight` to the average under `key`; smaller priorities are shown first."""
    for _, meter in _meters(key, lambda: AverageMeter(round=round), priority):
        meter.update(value, weight)


def log_derived(key: str, fn: Callable[[MetersDict], Any], priority: int = 20) -> None:
    """Shows `fn(meters)` under `key`."""
    for _ in _meters(key, lambda: DerivedMeter(fn), priority):
        pass


def log_speed(key: str, value: Any, priority: int = 30, round: int | None = None) -> None:  # noqa: A002
    """Counts `value` events in the rate under `key`. In a lasting aggregator the clock starts with the call after the
    first `SPEED_WARMUP`, which itself is not counted; in a temporary one it started when that was opened."""
    for aggregator, meter in _meters(key, lambda: TimeMeter(round=round), priority):
        lasting = any(aggregator is named for named in _aggregators.values())
        aggregator.calls[key] += 1
        if lasting and aggregator.calls[key] <= SPEED_WARMUP + 1:
            meter.reset()
            continue
        if not lasting and aggregator.calls[key] == 1:
            meter.start = aggregator.opened
        meter.update(value)


def log_start_time(key: str, priority: int = 40, round: int | None = None) -> None:  # noqa: A002
    """Starts the stop-watch under `key`."""
    for _, meter in _meters(key, lambda: StopwatchMeter(round=round), priority):
        meter.start()


def log_stop_time(key: str, weight: float = 0.0) -> None:
    """Stops the stop-watch under `key`."""
    for aggregator in _active:
        meter = aggregator.get(key)
        if isinstance(meter, StopwatchMeter):
            meter.stop(weight)


def log_custom(new_meter_fn: Callable[[], Any], key: str, *args: Any, priority: int = 50, **kwargs: Any) -> None:
    """Updates a meter of the caller's own class under `key`."""
    for _, meter in _meters(key, new_meter_fn, priority):
        meter.update(*args, **kwargs)


def get_meters(name: str) -> MetersDict | None:
    """The lasting aggregator called `name`, or None."""
    return _aggregators.get(name)


def get_meter(name: str, key: str) -> Meter | None:
    """One meter of the aggregator called `name`, or None."""
    return _aggregators.get(name, MetersDict()).get(key)


def reset_meter(name: str, key: str) -> None:
    """Resets one meter."""
    meter = get_meter(name, key)
    if meter is not None:
        meter.reset()


def reset_meters(name: str) -> None:
    """Resets each meter of the aggregator called `name`."""
    meters = get_meters(name)
    if meters is not None:
        meters.reset()


def get_smoothed_value(name: str, key: str) -> Any:
    """The number to log for one meter."""
    return _aggregators[name].get_smoothed_value(key)


def get_smoothed_values(name: str) -> OrderedDict[str, Any]:
    """The numbers to log for the aggregator called `name`."""
    return _aggregators.get(name, MetersDict()).get_smoothed_values()


def state_dict() -> OrderedDict[str, Any]:
    """Aggregator name -> list of (priority, key, meter class name, meter state)."""
    return OrderedDict((name, meters.state_dict()) for name, meters in _aggregators.items())


def load_state_dict(state: dict[str, Any]) -> None:
    """Restores what `state_dict` returned. Aggregators that are open stay open."""
    for name, content in state.items():
        _aggregators.setdefault(name, MetersDict()).load_state_dict(content)


reset()
