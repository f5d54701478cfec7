"""Checks of the training state in a checkpoint, before anything of it is used: wrong types, shapes or numbers give an
error of one sentence, not a traceback in the middle of an epoch or a training with meaningless values. The layout is in
docs/formats.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fairseq.errors import BadFile

MOST = 1 << 53  # counts above have no exact float; none is as large
LONGEST = 80  # characters of a value that a sentence shows


class StateCheck:
    """Checks parts of the checkpoint `filename`; remedy: the remedy in its errors."""

    def __init__(self, filename: str, remedy: str) -> None:
        self.filename, self.remedy = filename, remedy

    def refuse(self, found: str, expected: str) -> BadFile:
        """The error."""
        return BadFile(self.filename, found, expected, self.remedy)

    def of_type(self, value: Any, kind: type | tuple[type, ...], place: str, expected: str) -> Any:
        """`value`, if it is of the type."""
        if not isinstance(value, kind):
            raise self.refuse(f"{_short(value)} as {place}", expected)
        return value

    def count(self, value: Any, place: str) -> int:
        """A whole number of at least 0."""
        number = plain_number(value)
        if number is None or number != number or not 0 <= number < MOST or int(number) != number:
            raise self.refuse(f"{_short(value)} as {place}", "a whole number of at least 0")
        return int(number)

    def number(self, value: Any, place: str, least: float = -math.inf, infinite: bool = False) -> float:
        """A number of at least `least`; an infinite one only if that is allowed."""
        number = plain_number(value)
        if number is None or number != number or number < least or (math.isinf(number) and not infinite):
            expected = "a number" if least < 0 else f"a number of at least {least}"
            raise self.refuse(f"{_short(value)} as {place}", expected)
        return number

    def tensor(self, value: Any, shape: torch.Size, place: str) -> None:
        """A tensor of finite numbers, of this shape."""
        if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
            raise self.refuse(f"{_short(value)} as {place}", f"numbers of the shape {tuple(shape)}")
        if not is_finite(value):
            raise self.refuse(f"numbers that are not finite in {place}", "finite ones")


def plain_number(value: Any) -> float | int | None:
    """The Python number behind a number of any library, or None."""
    if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; needs no memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach()))


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # a crafted object may raise exceptions of any kind
        text = type(value).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a checkpoint


def check_history(filename: str, history: Any) -> list[dict[str, Any]]:
    """`optimizer_history`: who trained the model so far, the last one with the state of its schedule."""
    check = StateCheck(filename, "use an earlier checkpoint, or pass --reset-optimizer")
    check.of_type(history, list, "optimizer_history", "a list of one entry for each run")
    if not history:
        raise check.refuse("an empty optimizer_history", "an entry for each run")
    for entry in history:
        check.of_type(entry, dict, "an entry of optimizer_history", "a dictionary")
    last = history[-1]
    check.count(last.get("num_updates"), "num_updates")
    return history


def check_schedule(filename: str, state: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """`lr_scheduler_state`, for a schedule with the state `own`, from which missing fields are taken."""
    check = StateCheck(filename, "use an earlier checkpoint, or pass --reset-lr-scheduler")
    check.of_type(state, dict, "lr_scheduler_state", "a dictionary")
    for key in own:
        value = state.get(key)
        if key == "best":
            if value is not None:
                check.number(value, "the schedule's best", infinite=True)
        elif key in state and isinstance(own[key], int):
            check.count(value, f"the schedule's {key}")
    return {**own, **state}


def check_extra_state(filename: str, extra: Any) -> dict[str, Any]:
    """`extra_state`: the position in the data, the best score so far, patience, metrics, the time spent."""
    check = StateCheck(filename, "use an earlier checkpoint, or pass --reset-meters and --reset-dataloader")
    check.of_type(extra, dict, "extra_state", "a dictionary")
    place = check.of_type(extra.get("train_iterator"), dict, "train_iterator", "a dictionary")
    check.count(place.get("epoch"), "the epoch of train_iterator")
    check.count(place.get("iterations_in_epoch", 0), "iterations_in_epoch of train_iterator")
    if "iterated" in extra:
        iterated = check.of_type(extra["iterated"], dict, "iterated", "a dictionary")
        check.count(iterated.get("batches"), "the number of batches")
        check.of_type(iterated.get("digest"), str, "the digest of the batches", "a text")
    for name in ("best", "val_loss"):
        if extra.get(name) is not None:
            check.number(extra[name], name, infinite=True)
    check.number(extra.get("previous_training_time", 0.0), "previous_training_time", least=0.0)
    patience = check.of_type(extra.get("patience", {}), dict, "patience", "a dictionary")
    if patience:
        check.count(patience.get("runs"), "runs of patience")
        if patience.get("best") is not None:
            check.number(patience["best"], "best of patience", infinite=True)
    for name, meters in check.of_type(extra.get("metrics", {}), dict, "metrics", "a dictionary").items():
        for meter in check.of_type(meters, (list, tuple), f"metrics {_short(name)}", "a list of meters"):
            _check_meter(check, meter)
    return extra


def _check_meter(check: StateCheck, meter: Any) -> None:
    """(priority, key, class name, state); the numbers of the state may be absent or None."""
    form = "(priority, name, class name, state)"
    if not isinstance(meter, list | tuple) or len(meter) != 4:
        raise check.refuse(f"{_short(meter)} as a meter", form)
    priority, key, kind, state = meter
    check.count(priority, "a meter's priority")
    if not isinstance(key, str) or not isinstance(kind, str) or not isinstance(state, dict):
        raise check.refuse(f"{_short(meter)} as a meter", form)
    for name, value in state.items():
        if name == "round" and value is not None:
            check.count(value, f"the digits of meter {key}")
        elif value is not None and plain_number(value) is None:
            raise check.refuse(f"{_short(value)} as {_short(name)} of meter {key}", "a number")


def check_optimizer_state(filename: str, saved: Any, optimizer: Any, updates: int) -> dict[str, Any]:
    """`last_optimizer_state` after `updates` updates, for `optimizer` (a `FairseqOptimizer`): as many groups and
    parameters as it has, settings of the same types, tensors of its parameters' shapes. Settings that the file lacks
    are taken from the optimizer."""
    check = StateCheck(filename, "use an earlier checkpoint, or pass --reset-optimizer")
    check.of_type(saved, dict, "last_optimizer_state", "a dictionary")
    if "master_params" in saved and optimizer.master_params is not None:
        check.tensor(saved["master_params"], optimizer.master_params.shape, "master_params")
    if "loss_scale" in saved and check.number(saved["loss_scale"], "loss_scale", least=0.0) == 0:
        raise check.refuse("0 as loss_scale", "a number above 0")
    state = check.of_type(saved.get("state"), dict, "the optimizer's state", "a dictionary")
    groups = check.of_type(saved.get("param_groups"), list, "param_groups", "a list")
    own_groups = optimizer.optimizer.param_groups
    if len(groups) != len(own_groups):
        raise check.refuse(f"{len(groups)} param_groups", f"{len(own_groups)}, as the optimizer has")
    listed = [group.get("params") for group in groups if isinstance(group, dict)]
    params = {n for numbers in listed if isinstance(numbers, list) for n in numbers if isinstance(n, int)}
    if not params.issuperset(state) or (updates and optimizer.state_keys and not state):
        raise check.refuse("states of none of the parameters, or of others", "one of each that was updated")
    completed = []
    for group, own in zip(groups, own_groups, strict=True):
        check.of_type(group, dict, "an entry of param_groups", "a dictionary")
        numbers = check.of_type(group.get("params"), list, "params of param_groups", "a list")
        if len(numbers) != len(own["params"]) or not all(isinstance(number, int) for number in numbers):
            raise check.refuse(f"{len(numbers)} parameters in param_groups", f"{len(own['params'])}, as the model has")
        settings = {key: value for key, value in own.items() if key != "params"}
        for key, value in settings.items():
            if key in group:
                _check_setting(check, key, group[key], value)
        needed = optimizer.state_keys + (("max_exp_avg_sq",) if group.get("amsgrad") else ())
        for number, parameter in zip(numbers, own["params"], strict=True):
            entry = check.of_type(state.get(number, {}), dict, f"state of parameter {number}", "a dictionary")
            _check_entry(check, number, entry, parameter, needed)
        completed.append({**settings, **group})
    return {**saved, "param_groups": completed}


def _check_setting(check: StateCheck, key: str, value: Any, own: Any) -> None:
    """A setting of a group is of the kind that the optimizer has itself."""
    place = f"the optimizer's {_short(key)}"
    if isinstance(own, tuple | list):
        values = check.of_type(value, (tuple, list), place, f"{len(own)} numbers")
        if len(values) != len(own):
            raise check.refuse(f"{_short(value)} as {place}", f"{len(own)} numbers")
        for number in values:
            if not 0 <= check.number(number, place) < 1:
                raise check.refuse(f"{_short(value)} as {place}", "numbers from 0 to below 1")
    elif isinstance(own, bool) or own is None:
        if not isinstance(value, bool | None):
            raise check.refuse(f"{_short(value)} as {place}", "True, False or None")
    elif isinstance(own, int | float):
        check.number(value, place, least=0.0 if key in ("lr", "lr_old", "eps") else -math.inf)


def _check_entry(
    check: StateCheck, number: int, entry: dict[Any, Any], parameter: torch.Tensor, needed: tuple[str, ...]
) -> None:
    """The state of one parameter: a count of steps, and tensors of the parameter's shape."""
    missing = [key for key in needed if key not in entry] if entry else []
    if missing:
        raise check.refuse(f"no {missing[0]} for parameter {number}", f"{', '.join(needed)} for each that has a state")
    for key, value in entry.items():
        place = f"{_short(key)} of parameter {number}"
        if key == "step":
            check.count(value, place)
        elif isinstance(value, torch.Tensor) or key in needed:
            check.tensor(value, parameter.shape, place)
        elif value is not None and plain_number(value) is None:
            raise check.refuse(f"{_short(value)} as {place}", "a tensor or a number")
