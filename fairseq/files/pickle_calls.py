"""The calls that a pickle may make, and their arguments. An allow-list of names is not enough: `list(range(10**12))`,
an array that is declared larger than its file, and a tensor that extends beyond its storage use only allowed names.
Every call that real files make is listed here with a check of its arguments; all others are refused by name.

Also here: which values may be keys. Hashing nested tuples takes time exponential in their depth (a "billion laughs"),
so keys of dictionaries and items of sets must be numbers, texts, or flat tuples of these."""

from __future__ import annotations

import argparse
import collections
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PLAIN = (str, bytes, int, float, complex, bool, type(None))
LONGEST_RANGE = 1 << 62
_ENCODINGS = (("latin1",), ("latin-1",))
SHARED_ELEMENTS = 1 << 20  # a tensor that repeats its storage (stride 0) may be this large, however small the file

Check = Callable[..., bool]


def is_key(value: Any) -> bool:
    """Whether hashing and comparing `value` costs no more than its own bytes."""
    if isinstance(value, tuple):
        return all(isinstance(item, PLAIN) or _is_global(item) for item in value)
    return isinstance(value, PLAIN) or _is_global(value) or isinstance(value, np.generic | torch.dtype)


def is_state(target: Any, state: Any) -> bool:
    """Whether `state` may become the state of `target`. NumPy does not check a state: a dtype's flags decide whether
    numbers are dereferenced as pointers, and some dtypes are shared by the whole process."""
    if isinstance(target, np.ndarray):
        return _array_state(state)
    if isinstance(target, np.dtype):
        return _dtype_state(target, state)
    inert = type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType
    if isinstance(target, inert) or hasattr(target, "__setstate__") or not hasattr(target, "__dict__"):
        return False
    return state is None or (isinstance(state, dict) and all(isinstance(name, str | bytes) for name in state))


def _array_state(state: Any) -> bool:
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        return False
    shape, dtype, _, data = state[-4:]
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes | bytearray | str):
        return False
    return isinstance(shape, tuple) and _shape(shape) and math.prod(shape) * dtype.itemsize == len(data)


def _dtype_state(target: Any, state: Any) -> bool:
    """Whether only the byte order changes, and only for a dtype that is not shared."""
    if not isinstance(state, tuple) or len(state) != 8 or state[2:5] != (None, None, None) or target.hasobject:
        return False
    version, order, *_, size, alignment, flags = state
    shared = target is np.dtype(target.str)
    return (
        version in (3, 4)
        and order in (("<", "|", "=") if shared else ("<", ">", "|", "="))
        and size in (-1, target.itemsize)
        and alignment in (-1, target.alignment)
        and flags in (0, target.flags)
    )


def _is_global(value: Any) -> bool:
    return isinstance(value, type)


def _nothing(*args: Any) -> bool:
    return not args


def _keys(*args: Any) -> bool:
    return not args or (len(args) == 1 and isinstance(args[0], list | tuple) and all(map(is_key, args[0])))


def _pairs(*args: Any) -> bool:
    if not args:
        return True
    content = args[0]
    if len(args) != 1 or not isinstance(content, list | tuple):
        return False
    return all(isinstance(pair, list | tuple) and len(pair) == 2 and is_key(pair[0]) for pair in content)


def _counts(*args: Any) -> bool:
    return not args or (len(args) == 1 and isinstance(args[0], dict))


def _items(*args: Any) -> bool:
    return not args or (isinstance(args[0], list | tuple) and all(_natural(n) or n is None for n in args[1:]))


def _factory(*args: Any) -> bool:
    return not args or (args[0] in (None, int, float, list, dict, set, str) and _counts(*args[1:]))


def _bytes(*args: Any) -> bool:
    return not args or isinstance(args[0], bytes | bytearray) or (isinstance(args[0], str) and args[1:] in _ENCODINGS)



def _integers(*args: Any) -> bool:
    return all(n is None or (isinstance(n, int) and abs(n) < LONGEST_RANGE) for n in args)


def _numbers(*args: Any) -> bool:
    return all(isinstance(n, int | float) for n in args)


def _text(*args: Any) -> bool:
    return bool(args) and isinstance(args[0], str) and all(isinstance(part, str) for part in args[1:])


def _device(*args: Any) -> bool:
    return bool(args) and isinstance(args[0], str) and all(isinstance(part, int) for part in args[1:])


def _shape(*args: Any) -> bool:
    return not args or (len(args) == 1 and isinstance(args[0], list | tuple) and all(map(_natural, args[0])))


def _natural(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < LONGEST_RANGE


def _instance(*args: Any) -> bool:
    """copyreg._reconstructor: an empty instance, never a container made from an argument."""
    return len(args) == 3 and isinstance(args[0], type) and args[1] is object and args[2] is None


def _dtype(*args: Any) -> bool:
    flags = all(isinstance(flag, bool | int) for flag in args[1:])
    return flags and bool(args) and isinstance(args[0], str) and len(args[0]) < 64


def _empty_array(*args: Any) -> bool:
    """numpy's _reconstruct: an array without elements, whose content comes later and is as long as its bytes."""
    return len(args) == 3 and args[0] is np.ndarray and args[1] in ((0,), (), [0]) and isinstance(args[2], bytes | str)


def _scalar(*args: Any) -> bool:
    if not args or not isinstance(args[0], np.dtype) or args[0].hasobject:
        return False
    return len(args) == 2 and isinstance(args[1], bytes | str) and len(args[1]) == args[0].itemsize


def _buffer(*args: Any) -> bool:
    if len(args) < 3 or not isinstance(args[0], bytes | bytearray) or not isinstance(args[1], np.dtype):
        return False
    shape = args[2] if isinstance(args[2], tuple) else (args[2],)
    return not args[1].hasobject and _shape(shape) and math.prod(shape) * args[1].itemsize == len(args[0])


def _tensor(storage: Any = None, offset: Any = 0, size: Any = (), stride: Any = (), *rest: Any) -> bool:
    """A tensor inside its storage; otherwise torch would enlarge the storage, or read memory beyond it."""
    if not isinstance(storage, torch.storage.TypedStorage) or not _natural(offset):
        return False
    if not all(isinstance(part, list | tuple) and all(map(_natural, part)) for part in (size, stride)):
        return False
    if len(size) != len(stride) or len(size) > 16 or (len(rest) > 1 and rest[1]) or len(rest) > 2:
        return False  # hooks would be called, and metadata changes what the elements mean
    stored, elements = storage._size(), math.prod(size)
    if elements > max(stored, SHARED_ELEMENTS):
        return False
    return not elements or offset + sum((n - 1) * step for n, step in zip(size, stride)) < stored


def _parameter(*args: Any) -> bool:
    hooks = any(isinstance(part, dict) and part for part in args[1:])
    return bool(args) and isinstance(args[0], torch.Tensor) and not hooks


def _encoded(*args: Any) -> bool:
    return bool(args) and all(isinstance(part, str) for part in args)


def call_checks(latin1: Any, reconstructor: Any, reconstruct: Any, scalar: Any, frombuffer: Any) -> dict[Any, Check]:
    """The callables of real files, each with the check of its arguments. The five given ones have no public name."""
    return {
        latin1: _encoded,
        reconstructor: _instance,
        reconstruct: _empty_array,
        scalar: _scalar,
        frombuffer: _buffer,
        set: _keys,
        frozenset: _keys,
        bytearray: _bytes,
        bytes: _bytes,
        complex: _numbers,
        range: _integers,
        slice: _integers,
        dict: _nothing,
        list: _nothing,
        object: _nothing,
        argparse.Namespace: _nothing,
        collections.OrderedDict: _pairs,
        collections.defaultdict: _factory,
        collections.deque: _items,
        collections.Counter: _counts,
        torch.Size: _shape,
        torch.device: _device,
        np.dtype: _dtype,
        torch._utils._rebuild_tensor: _tensor,
        torch._utils._rebuild_tensor_v2: _tensor,
        torch._utils._rebuild_parameter: _parameter,
        torch.nn.Parameter: _parameter,
    }
