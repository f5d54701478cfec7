"""The number of entries in a datastore's files, their types and width: read from the sidecar, else from NumPy headers,
else inferred from the bytes (`raw_arrays`), and compared with the flags. What cannot be inferred is refused; what is
likely but not certain is used with a warning."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile, BadFlag
from fairseq.files.nearby import input_size
from fairseq.retrieval.datastore.raw_arrays import (
    COPY,
    KEY_DTYPES,
    NAMES,
    VALUE_DTYPES,
    Header,
    are_tokens,
    check_vectors,
    foreign_tokens,
    no_tokens,
    number_bytes,
    read_header,
    sample_bytes,
    token_types,
    vector_type,
)

logger = logging.getLogger(__name__)


def keys_path(prefix: str) -> str:
    """File of the keys."""
    return prefix + "_keys.npy"


def values_path(prefix: str) -> str:
    """File of the values."""
    return prefix + "_vals.npy"


def weights_path(prefix: str) -> str:
    """File of the weights that a merged datastore has."""
    return prefix + "_weights.npy"


@dataclass
class GivenLayout:
    """The properties of a datastore that flags or callers give; None where they are not given. fp16: whether keys are
    float16."""

    size: int | None = None
    dimension: int | None = None
    fp16: bool | None = None


@dataclass
class Layout:
    """Number of rows, width and type of the keys (None when the keys are not opened), type of the values, and the
    offsets in bytes at which the numbers begin in both files."""

    rows: int
    dimension: int | None
    key_dtype: str | None
    value_dtype: str
    key_offset: int = 0
    value_offset: int = 0


@dataclass
class _File:
    """A file of numbers: its NumPy header, if it has one, the size of its numbers in bytes, and a sample of these
    bytes."""

    path: str
    header: Header | None
    size: int
    sample: NDArray[np.uint8]

    @classmethod
    def open(cls, path: str) -> _File:
        header = read_header(path)
        size = number_bytes(path, header)
        return cls(path, header, size, sample_bytes(path, 0 if header is None else header.offset))

    @property
    def offset(self) -> int:
        return 0 if self.header is None else self.header.offset


def infer_layout(prefix: str, info: dict[str, Any], given: GivenLayout, need_keys: bool) -> Layout:
    """The layout of the datastore `prefix`; info: the fields of its sidecar (empty: it has none). MissingFile, BadFile
    or BadFlag when files, sidecar and flags do not fit together."""
    remedy = "check the prefix that was given for the datastore"
    input_size(values_path(prefix), remedy, prefix)
    has_keys = need_keys or os.path.exists(keys_path(prefix))
    if has_keys:
        input_size(keys_path(prefix), remedy, prefix)
    if info:
        return _checked_against_sidecar(prefix, info, given, has_keys)
    values = _File.open(values_path(prefix))
    candidates = _value_layouts(values, given.size)
    if candidates[0][0] == 0 and has_keys and os.path.getsize(keys_path(prefix)):
        found = f"no values beside {os.path.getsize(keys_path(prefix))} bytes of keys"
        raise BadFile(values_path(prefix), found, "one for each key", COPY)
    if not has_keys or candidates[0][0] == 0:
        rows, value_dtype = candidates[0]
        if given.size is None and values.header is None:
            _warn(prefix, f"{rows} {NAMES[value_dtype]} values", "--dstore-size")
        return Layout(rows, given.dimension, None, value_dtype, value_offset=values.offset)
    keys = _File.open(keys_path(prefix))
    if keys.header is not None:
        return _headed_layout(keys, keys.header, values, candidates, given)
    if given.dimension is not None:
        return _sized_layout(keys, values, candidates, given)
    return _guessed_layout(prefix, keys, values, candidates, given)


def _warn(prefix: str, taken_for: str, flags: str) -> None:
    said = "%s: no sidecar describes it; it is read as %s, inferred from its bytes; give %s to be certain"
    logger.warning(said, prefix, taken_for, flags)


# ---------------------------------------------------------------------------------------------------------------------
# Without a sidecar


def _value_layouts(values: _File, size: int | None) -> list[tuple[int, str]]:
    """All possible (rows, type) of a values file, the likeliest first; BadFile when there is none."""
    if values.header is not None:
        return [_headed_values(values, values.header, size)]
    types = token_types(values.sample)
    expected_type = VALUE_DTYPES.get(values.size // size) if size and values.size % size == 0 else None
    foreign = bool(types) and types[0] != VALUE_DTYPES[8] and foreign_tokens(values.sample) is not None
    if not types or foreign:
        raise no_tokens(values.path, values.sample, expected_type or VALUE_DTYPES[8])
    layouts = [(values.size // np.dtype(dtype).itemsize, dtype) for dtype in types]
    layouts = [(rows, dtype) for rows, dtype in layouts if values.size == rows * np.dtype(dtype).itemsize]
    fitting = [layout for layout in layouts if size is None or layout[0] >= size]
    if not fitting:
        raise _no_such_size(values, types, size)
    return sorted(fitting, key=lambda layout: layout[0] != size)


def _no_such_size(values: _File, types: list[str], size: int | None) -> BadFile:
    if size is None:
        wanted = " or ".join(f"{np.dtype(dtype).itemsize} ({NAMES[dtype]})" for dtype in types)
        return BadFile(values.path, f"{values.size} bytes", f"a multiple of {wanted}", COPY)
    wanted = " or ".join(f"{size * np.dtype(dtype).itemsize} bytes ({NAMES[dtype]})" for dtype in types)
    remedy = "check --dstore-size; the file may be cut short"
    return BadFile(values.path, f"{values.size} bytes", f"{wanted} for {size} entries", remedy)


def _headed_values(values: _File, header: Header, size: int | None) -> tuple[int, str]:
    rows = header.shape[0] if header.shape else 0
    if header.dtype not in VALUE_DTYPES.values() or header.shape not in ((rows,), (rows, 1)):
        found = f"an array of type {header.dtype} and shape {header.shape}"
        raise BadFile(values.path, found, "int64, int32 or int16 values, (N,) or (N, 1)", "convert the file")
    if not are_tokens(values.sample, header.dtype):
        raise no_tokens(values.path, values.sample, header.dtype)
    if size is not None and size > rows:
        raise BadFlag("--dstore-size", size, f"at most the {rows} values of {values.path}", "leave the flag out")
    return rows, header.dtype


def _headed_layout(
    keys: _File, header: Header, values: _File, candidates: list[tuple[int, str]], given: GivenLayout
) -> Layout:
    """The layout when the keys have a NumPy header."""
    fits = header.dtype in KEY_DTYPES.values() and len(header.shape) == 2
    rows = [layout for layout in candidates if fits and layout[0] == header.shape[0]]
    if not rows or given.dimension not in (None, header.shape[1]) or (given.fp16 and header.dtype != KEY_DTYPES[2]):
        found = f"an array of type {header.dtype} and shape {header.shape}"
        width = "D" if given.dimension is None else given.dimension
        expected = f"{'float16' if given.fp16 else 'float16 or float32'} keys ({candidates[0][0]}, {width})"
        raise BadFile(keys.path, found, expected, "check the size, the dimension and the precision that were given")
    check_vectors(keys.path, keys.sample, header.dtype)
    return Layout(rows[0][0], header.shape[1], header.dtype, rows[0][1], keys.offset, values.offset)


def _sized_layout(keys: _File, values: _File, candidates: list[tuple[int, str]], given: GivenLayout) -> Layout:
    """The layout when the width of the keys is given."""
    width = given.dimension or 0
    for rows, value_dtype in candidates:
        for itemsize in (2,) if given.fp16 else (4,) if given.fp16 is False else (2, 4):
            if keys.size == rows * width * itemsize:
                check_vectors(keys.path, keys.sample, KEY_DTYPES[itemsize])
                return Layout(rows, width, KEY_DTYPES[itemsize], value_dtype, 0, values.offset)
    rows, _ = candidates[0]
    itemsize = 2 if given.fp16 else 4
    raise BadFile(
        keys.path,
        f"{keys.size} bytes",
        f"{rows * width * itemsize} bytes for {rows} entries of dimension {width} in "
        + ("half precision" if given.fp16 else f"single precision ({rows * width * 2} in half)"),
        f"check the size, the dimension and the precision that were given: there are {keys.size / rows:g} bytes a row",
    )


def _guessed_layout(
    prefix: str, keys: _File, values: _File, candidates: list[tuple[int, str]], given: GivenLayout
) -> Layout:
    """The layout when the width of the keys is not given: their precision is inferred from the bytes, and the width
    from the precision and the length of a row."""
    fitting = [(rows, dtype) for rows, dtype in candidates if keys.size % (2 * rows) == 0 and keys.size]
    if not fitting:
        rows = candidates[0][0]
        expected = f"a multiple of {rows} rows x {2 if given.fp16 else 4} bytes"
        raise BadFile(keys.path, f"{keys.size} bytes", expected, "check --dstore-size and --dstore-fp16")
    rows, value_dtype = fitting[0]
    row_bytes = keys.size // rows
    among: tuple[str, ...] = (KEY_DTYPES[2 if given.fp16 else 4],) if given.fp16 is not None else ("<f2", "<f4")
    if row_bytes % 4:
        among = tuple(dtype for dtype in among if dtype == "<f2")
    key_dtype = vector_type(keys.path, keys.sample, among) if among else None
    if key_dtype is None:
        found = f"nothing, and bytes in {keys.path} that do not tell ({row_bytes} an entry)"
        raise BadFlag("--dimension", found, "the width of the keys", "give it")
    width = row_bytes // np.dtype(key_dtype).itemsize
    if given.size is None or given.fp16 is None:
        taken_for = f"{rows} {NAMES[value_dtype]} values and keys of dimension {width} in {NAMES[key_dtype]}"
        _warn(prefix, taken_for, "--dimension and --dstore-size")
    return Layout(rows, width, key_dtype, value_dtype, 0, values.offset)


# ---------------------------------------------------------------------------------------------------------------------
# With one


def _checked_against_sidecar(prefix: str, info: dict[str, Any], given: GivenLayout, has_keys: bool) -> Layout:
    rows, width, key_dtype, value_dtype = (info[name] for name in ("rows", "dimension", "key_dtype", "value_dtype"))
    if key_dtype not in KEY_DTYPES.values() or value_dtype not in VALUE_DTYPES.values():
        raise BadFile(prefix + ".json", f"types {key_dtype} and {value_dtype}", "known types of keys and values")
    wanted = {values_path(prefix): rows * np.dtype(value_dtype).itemsize}
    if has_keys:
        wanted[keys_path(prefix)] = rows * width * np.dtype(key_dtype).itemsize
    for path, expected in wanted.items():
        found, headed = os.path.getsize(path), read_header(path) is not None
        if found != expected or headed:
            bytes_found = f"{found} bytes" + (" with a NumPy header" if headed else "")
            remedy = "save the datastore again"
            raise BadFile(path, bytes_found, f"{expected} bytes as {prefix}.json says", remedy)
    if given.size is not None and given.size > rows:
        raise BadFlag("--dstore-size", given.size, f"at most the {rows} entries of {prefix}", "leave the flag out")
    if given.dimension is not None and given.dimension != width:
        keys = f"keys of dimension {width}"
        raise BadFile(prefix + ".json", keys, f"dimension {given.dimension}", "check which model made it")
    if given.fp16 and key_dtype != KEY_DTYPES[2]:
        raise BadFlag("--dstore-fp16", f"single-precision keys in {prefix}", "half-precision keys", "drop the flag")
    if has_keys:
        check_vectors(keys_path(prefix), sample_bytes(keys_path(prefix)), key_dtype)
    return Layout(rows, width, key_dtype if has_keys else None, value_dtype)
