"""Meters: running averages, rates and stop-watches behind every logged number; their states go into checkpoints
(`extra_state.metrics`: aggregator -> list of (priority, key, meter class name, meter state)).

Values may be tensors on a GPU. They are summed there in float64 and copied to the CPU only when they are read, so that
logging does not make the CPU wait for the GPU after each update."""

from __future__ import annotations

import bisect
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch


def detached(value: Any) -> Any:
    """A Python number for values on the CPU; a float64 scalar tensor for values on another device."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value.item()
        return value.detach().double()
    return value.item() if hasattr(value, "item") else value  # NumPy scalars


def plain(value: Any) -> Any:
    """The Python number behind a tensor or a NumPy scalar; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def safe_round(number: Any, digits: int | None) -> Any:
    """`round` that also takes one-element tensors and None."""
    number = plain(number)
    return number if digits is None or number is None else round(number, digits)


class Meter:
    """Base class: something that is updated, reset, read (`smoothed_value`) and saved."""

    round: int | None = None

    @property
    def avg(self) -> Any:
        """The unrounded number."""
        raise RuntimeError(f"{type(self).__name__} does not define avg")

    def state_dict(self) -> dict[str, Any]:
        """The meter's state in plain Python numbers."""
        raise RuntimeError(f"{type(self).__name__} does not define state_dict")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        raise RuntimeError(f"{type(self).__name__} does not define load_state_dict")

    def reset(self) -> None:
        """Resets the meter to its initial state."""
        raise RuntimeError(f"{type(self).__name__} does not define reset")

    @property
    def smoothed_value(self) -> Any:
        """The number to log."""
        raise RuntimeError(f"{type(self).__name__} does not define smoothed_value")


class AverageMeter(Meter):
    """Weighted average of values; with total weight 0 it shows the latest value (num_updates, lr)."""

    def __init__(self, round: int | None = None) -> None:  # noqa: A002
        self.round = round
        self.reset()

    def reset(self) -> None:
        self.val: Any = None
        self.sum: Any = 0
        self.count: Any = 0

    def update(self, val: Any, n: Any = 1) -> None:
        """Adds `val` with weight `n`; None is ignored."""
        if val is None:
            return
        self.val, n = detached(val), detached(n)
        if isinstance(n, torch.Tensor) or n > 0:
            self.sum = self.sum + self.val * n
            self.count = self.count + n

    @property
    def avg(self) -> Any:
        """The weighted mean so far, as a Python number (None when nothing was seen)."""
        count = plain(self.count)
        return plain(self.sum) / count if count > 0 else plain(self.val)

    @property
    def smoothed_value(self) -> Any:
        return safe_round(self.avg, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"val": plain(self.val), "sum": plain(self.sum), "count": plain(self.count), "round": self.round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.val, self.sum, self.count = state_dict["val"], state_dict["sum"], state_dict["count"]
        self.round = state_dict.get("round")


class TimeMeter(Meter):
    """Events per second since the last reset. `init` carries seconds over from a restored state."""

    def __init__(self, init: float = 0, n: float = 0, round: int | None = None) -> None:  # noqa: A002
        self.round = round
        self.reset(init, n)

    def reset(self, init: float = 0, n: float = 0) -> None:
        self.init = init
        self.start = time.perf_counter()
        self.n: Any = n

    def update(self, val: Any = 1) -> None:
        """Counts `val` more events."""
        self.n = self.n + detached(val)

    @property
    def elapsed_time(self) -> float:
        """Seconds since the reset."""
        return self.init + time.perf_counter() - self.start

    @property
    def avg(self) -> float:
        """Events per second."""
        return plain(self.n) / max(self.elapsed_time, 1e-9)

    @property
    def smoothed_value(self) -> Any:
        return safe_round(self.avg, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"init": self.elapsed_time, "n": plain(self.n), "round": self.round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reset(init=state_dict.get("init", 0), n=state_dict.get("n", 0))
        self.round = state_dict.get("round")


class StopwatchMeter(Meter):
    """Seconds between `start` and `stop`, summed. Never stopped, it shows the seconds since `start`."""

    def __init__(self, round: int | None = None) -> None:  # noqa: A002
        self.round = round
        self.sum: Any = 0
        self.n: Any = 0
        self.start_time: float | None = None

    def start(self) -> None:
        """Starts (or restarts) the watch."""
        self.start_time = time.perf_counter()

    def stop(self, n: float = 1) -> None:
        """Adds the seconds since `start`, counted as `n` events."""
        if self.start_time is not None:
            self.sum += time.perf_counter() - self.start_time
            self.n += n

    def reset(self) -> None:
        self.sum, self.n = 0, 0
        self.start()

    @property
    def elapsed_time(self) -> float:
        """Seconds since the last `start`."""
        return 0.0 if self.start_time is None else time.perf_counter() - self.start_time

    @property
    def avg(self) -> float:
        """Seconds per event (total seconds when events have no weight)."""
        return self.sum / self.n if self.n > 0 else self.sum

    @property
    def smoothed_value(self) -> Any:
        return safe_round(self.avg if self.sum > 0 else self.elapsed_time, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "n": self.n, "round": self.round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sum, self.n = state_dict["sum"], state_dict["n"]
        self.start_time = None
        self.round = state_dict.get("round")


class DerivedMeter(Meter):
    """A number computed from the other meters of its dictionary (ppl from loss); has no state."""

    def __init__(self, function: Callable[[MetersDict], Any]) -> None:
        self.function = function

    def reset(self) -> None:
        """Nothing to forget."""


class MetersDict(OrderedDict[str, Meter]):
    """Meters by key, in the order of their priorities (ties: order of insertion)."""

    def __init__(self) -> None:
        super().__init__()
        self.priorities: list[tuple[int, int, str]] = []
        self.calls: Counter[str] = Counter()  # of the rates
        self.opened = time.perf_counter()

    def add_meter(self, key: str, meter: Meter, priority: int) -> None:
        """Inserts a new meter in the order of priorities."""
        assert key not in self, f"a meter named {key} exists already"
        super().__setitem__(key, meter)
        bisect.insort(self.priorities, (priority, len(self.priorities), key))
        for _, _, other in self.priorities:
            self.move_to_end(other)

    def get_smoothed_value(self, key: str) -> Any:
        """The number to log under `key`."""
        meter = self[key]
        return meter.function(self) if isinstance(meter, DerivedMeter) else meter.smoothed_value

    def get_smoothed_values(self) -> OrderedDict[str, Any]:
        """All numbers to log; keys that begin with an underscore are private and left out."""
        return OrderedDict((key, self.get_smoothed_value(key)) for key in self if not key.startswith("_"))

    def reset(self) -> None:
        """Resets each meter."""
        for meter in self.values():
            meter.reset()

    def state_dict(self) -> list[tuple[int, str, str, dict[str, Any]]]:
        """(priority, key, class name, state) of each meter that has a state."""
        return [
            (priority, key, type(self[key]).__name__, self[key].state_dict())
            for priority, _, key in self.priorities
            if not isinstance(self[key], DerivedMeter)
        ]

    def load_state_dict(self, state_dict: list[tuple[int, str, str, dict[str, Any]]]) -> None:
        """Replaces the contents by what `state_dict` returned; unknown meter classes are left out."""
        self.clear()
        self.priorities.clear()
        for priority, key, name, state in state_dict:
            if name in METERS:
                meter = METERS[name]()
                meter.load_state_dict(state)
                self.add_meter(key, meter, priority)


METERS: dict[str, Callable[[], Meter]] = {
    "AverageMeter": AverageMeter,
    "TimeMeter": TimeMeter,
    "StopwatchMeter": StopwatchMeter,
}
