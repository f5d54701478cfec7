"""Small public functions of fairseq, under the same names, for code that was written for fairseq."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import BadFlag, UserError
from fairseq.modules import get_activation_fn
from fairseq.modules.positional_embedding import make_positions

__all__ = [
    "apply_to_sample",
    "clip_grad_norm_",
    "eval_str_list",
    "fill_with_neg_inf",
    "get_activation_fn",
    "import_user_module",
    "item",
    "make_positions",
    "move_to_cuda",
    "resolve_max_positions",
    "split_paths",
    "strip_pad",
]


def import_user_module(args: Any) -> None:
    """Imports the package that `--user-dir` names, once, before options are parsed, so that the classes that it
    registers are available.

    This is the only way in which code of the user is executed. Relative paths are tried from the working directory,
    then from the folder above the `fairseq` package."""
    path = getattr(args, "user_dir", None)
    if path is None:
        return
    found = os.path.abspath(path)
    if not os.path.exists(found):
        found = os.path.abspath(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), path))
    if not os.path.exists(found):
        raise UserError(f"--user-dir: found nothing at {path}, expected a Python package's folder; check the path")
    parent, name = os.path.split(found)
    name = name.removesuffix(".py")
    loaded = sys.modules.get(name)
    if loaded is not None:
        origin = os.path.abspath(os.path.dirname(getattr(loaded, "__file__", None) or found))
        if origin not in (found, parent):
            raise UserError(
                f"--user-dir: a module named {name} is already loaded from {origin}, so {found} cannot be imported; "
                "rename the folder"
            )
        return
    sys.path.insert(0, parent)
    try:
        importlib.import_module(name)
        importlib.import_module("fairseq.options")  # its registries must exist before the plug-in's names are read
    except Exception as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(found)]
        place = f"{where[-1].filename} line {where[-1].lineno}" if where else found
        raise UserError(
            f"--user-dir: {place} raised {type(error).__name__} ({error}) while it was imported; correct it"
        ) from error
    finally:
        sys.path.remove(parent)


def split_paths(paths: str) -> list[str]:
    """Splits a list of paths at the operating system's path separator ("a.pt:b.pt" on POSIX)."""
    return paths.split(os.pathsep)


def apply_to_sample(function: Callable[[Tensor], Tensor], sample: Any) -> Any:
    """Applies `function` to every tensor inside nested dicts, lists and tuples."""
    if isinstance(sample, Tensor):
        return function(sample)
    if isinstance(sample, dict):
        return {key: apply_to_sample(function, value) for key, value in sample.items()}
    if isinstance(sample, list | tuple):
        return type(sample)(apply_to_sample(function, value) for value in sample)
    return sample


def move_to_cuda(sample: Any, device: torch.device | str = "cuda") -> Any:
    """Copies the tensors of a batch to the GPU."""
    return apply_to_sample(lambda tensor: tensor.to(device, non_blocking=True), sample)


def strip_pad(tensor: Tensor, pad: int) -> Tensor:
    """The elements of `tensor` that are not `pad`, flattened."""
    return tensor[tensor.ne(pad)]


def resolve_max_positions(*limits: Any) -> Any:
    """The component-wise smallest of several length limits (numbers, tuples or None for unlimited)."""
    resolved: Any = None
    for limit in limits:
        if limit is None:
            continue
        if resolved is None:
            resolved = limit
        elif isinstance(resolved, tuple) or isinstance(limit, tuple):
            left = resolved if isinstance(resolved, tuple) else (resolved,) * len(limit)
            right = limit if isinstance(limit, tuple) else (limit,) * len(left)
            resolved = tuple(min(a, b) for a, b in zip(left, right, strict=True))
        else:
            resolved = min(resolved, limit)
    return resolved


def item(value: Any) -> Any:
    """A Python number for a one-element tensor; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def fill_with_neg_inf(tensor: Tensor) -> Tensor:
    """A tensor of minus infinity in the shape and type of `tensor`."""
    return torch.full_like(tensor, float("-inf"))


def eval_str_list(
    text: Any, type: Callable[[str], Any] = float, flag: str = "a list"  # noqa: A002
) -> list[Any] | None:
    """A list of numbers from "0.25,0.1", "(0.9, 0.999)", "[1, 2]" or a number; literals only, nothing is evaluated.

    BadFlag naming `flag` for anything else."""
    if text is None:
        return None
    if isinstance(text, str):
        words: Iterable[Any] = [word for word in text.strip("()[] ").split(",") if word.strip()]
    elif isinstance(text, Sequence):
        words = text
    else:
        words = [text]
    try:
        return [type(word) for word in words]
    except ValueError:
        example = "20000,60000" if type is int else "0.25,0.1"
        raise BadFlag(flag, repr(text), f"numbers such as {example}") from None


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients in place by max_norm / (norm + 1e-6) when their global L2 norm exceeds max_norm > 0.

    Returns the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norms = torch._foreach_norm([g.detach() for g in gradients])
    norm = torch.stack([n.float() for n in norms]).norm()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


