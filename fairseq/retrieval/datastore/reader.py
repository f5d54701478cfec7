"""The datastore: one (key, value) pair per token of a text. Keys are the language model's activations, values the
tokens that followed; the entry after entry i in the text is entry i + 1, which is all that a pointer needs.

Files (the RetoMaton layout): `PREFIX_keys.npy` and `PREFIX_vals.npy` are raw row-major arrays without a numpy header,
keys (N, D) float16 or float32, values (N, 1) int64 (other tools: int32 or int16). `PREFIX.json` describes them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile, BadFlag
from fairseq.files.checksums import check_opened
from fairseq.files.inputs import regular_size
from fairseq.files.sidecar import read_sidecar

logger = logging.getLogger(__name__)

KIND = "datastore"
VALUE_DTYPES = {8: "<i8", 4: "<i4", 2: "<i2"}
KEY_DTYPES = {2: "<f2", 4: "<f4"}
SCAN_ROWS = 65536
LARGEST_VOCABULARY = 1 << 20


def keys_path(prefix: str) -> str:
    """File of the keys."""
    return prefix + "_keys.npy"


def values_path(prefix: str) -> str:
    """File of the values."""
    return prefix + "_vals.npy"


def weights_path(prefix: str) -> str:
    """File of the weights that a merged datastore has."""
    return prefix + "_weights.npy"


def read_weights(datastore: Datastore) -> NDArray[np.int64]:
    """(N,): how many entries each one of a merged datastore stands for; BadFile unless all are at least 1."""
    path, remedy = weights_path(datastore.prefix), "merge again with fairseq-greedy-merge"
    found = file_size(path, "merge with fairseq-greedy-merge, or drop --dstore-weights")
    rows = datastore.info.get("rows", datastore.size)
    if found != rows * 8:
        raise BadFile(path, f"{found} bytes", f"{rows * 8} (int64) for {rows} entries", remedy)
    check_opened(datastore.prefix, {"weights": path}, whole=True)
    weights = np.fromfile(path, "<i8", datastore.size)
    if weights.min(initial=1) < 1:
        raise BadFile(path, f"a weight of {weights.min()}", "weights of at least 1", remedy)
    return weights


@dataclass
class Datastore:
    """An open datastore. `keys` is (N, D) float16/float32 (None when not opened), `values` (N,) integers.

    `size` is N; `info` the sidecar's fields (empty for downloaded files)."""

    prefix: str
    keys: NDArray[Any] | None
    values: NDArray[Any]
    dimension: int | None
    info: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.values)

    def require_keys(self, purpose: str) -> NDArray[Any]:
        """The keys; BadFlag when they were not opened."""
        if self.keys is None:
            raise BadFlag("--no-load-keys", "keys that were not opened", f"open keys for {purpose}", "drop this flag")
        return self.keys

    @classmethod
    def open(
        cls,
        prefix: str,
        size: int | None = None,
        dimension: int | None = None,
        fp16: bool | None = None,
        load_keys: bool = True,
        in_memory: bool = False,
        fallback_dimension: int | None = None,
    ) -> Datastore:
        """Opens `PREFIX_keys.npy` and `PREFIX_vals.npy` read-only, as memory maps or (`in_memory`) copied.

        Size, dimension and types come from the sidecar, else from the arguments, else from the files' lengths; what
        is given must agree with what is found (BadFile). A `size` below the number of rows opens the first rows;
        when neither a sidecar nor `dimension` tells the width, `fallback_dimension` is preferred to one that follows
        from the file's length."""
        info = read_sidecar(prefix, KIND, {"rows": int, "dimension": int, "key_dtype": str, "value_dtype": str}) or {}
        layout = _infer_layout(prefix, info, size, dimension, fp16, load_keys, fallback_dimension)
        rows = layout.rows if size is None else size
        if rows < layout.rows:
            logger.warning("%s: the first %d of its %d entries, as --dstore-size says", prefix, rows, layout.rows)
        files = {"values": values_path(prefix)}
        if load_keys and layout.key_dtype is not None:
            files["keys"] = keys_path(prefix)
        check_opened(prefix, files)
        values = _map(values_path(prefix), layout.value_dtype, (layout.rows, 1))[:rows, 0]
        if not info:
            _check_not_halved(prefix, values)
        keys = None
        if load_keys and layout.key_dtype is not None and layout.dimension is not None:
            keys = _map(keys_path(prefix), layout.key_dtype, (layout.rows, layout.dimension))[:rows]
        if in_memory:
            largest = int(values.max(initial=0))
            values = values.astype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
            keys = None if keys is None else np.array(keys)
        return cls(prefix, keys, values, layout.dimension, info)


@dataclass
class _Layout:
    rows: int
    dimension: int | None
    key_dtype: str | None
    value_dtype: str


def _check_not_halved(prefix: str, values: NDArray[Any]) -> None:
    """BadFile when values that were taken for a narrow type, by the file's length, are wider ones cut short: then every
    second one is the upper, empty half of a number. No text has every second token 0."""
    some = values[:SCAN_ROWS]
    if values.itemsize < 8 and len(some) >= 16 and some.any() and not some[1::2].any():
        raise BadFile(
            values_path(prefix),
            f"{len(values) * values.itemsize} bytes that are no {values.itemsize * 8}-bit values",
            f"{len(values) * 8} bytes (int64) for {len(values)} entries",
            "the file seems to be cut short; copy it again",
        )


def _map(path: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def file_size(path: str, remedy: str = "") -> int:
    """Bytes of a regular file; MissingFile when it is not there."""
    return regular_size(path, remedy)


def _infer_layout(
    prefix: str,
    info: dict[str, Any],
    size: int | None,
    dimension: int | None,
    fp16: bool | None,
    need_keys: bool,
    fallback_dimension: int | None,
) -> _Layout:
    """Rows, dimension and types of the two files, from whatever is known; checks everything that can be checked."""
    remedy = "check the prefix that was given for the datastore"
    value_bytes = file_size(values_path(prefix), remedy)
    has_keys = need_keys or os.path.exists(keys_path(prefix))
    key_bytes = file_size(keys_path(prefix), remedy) if has_keys else None
    if info:
        return _checked_against_sidecar(prefix, info, size, dimension, fp16, value_bytes, key_bytes)

    rows, value_dtype = _value_layout(prefix, value_bytes, size)
    if key_bytes is None or rows == 0:
        return _Layout(rows, dimension, None, value_dtype)
    key_itemsize = 2 if fp16 else 4
    if dimension is None:
        dimension, key_itemsize = _guess_width(keys_path(prefix), rows, key_bytes, fp16, fallback_dimension)
    elif fp16 is None and key_bytes == rows * dimension * 2:
        key_itemsize = 2
    if key_bytes != rows * dimension * key_itemsize:
        raise BadFile(
            keys_path(prefix),
            f"{key_bytes} bytes",
            f"{rows * dimension * key_itemsize} bytes for {rows} entries of dimension {dimension} "
            f"in {'half' if key_itemsize == 2 else 'single'} precision",
            "check the size, the dimension and the precision that were given",
        )
    return _Layout(rows, dimension, KEY_DTYPES[key_itemsize], value_dtype)


def _guess_width(
    path: str, rows: int, key_bytes: int, fp16: bool | None, fallback_dimension: int | None
) -> tuple[int, int]:
    """(dimension, bytes a number) of keys that nothing describes, from the length of a row and a look at its bytes.

    The README's commands for Law-MT leave out both the width (1536) and --dstore_fp16."""
    row_bytes, rest = divmod(key_bytes, rows)
    if rest or row_bytes % 2 or (row_bytes % 4 and fp16 is False):
        found, expected = f"{key_bytes} bytes", f"a multiple of {rows} rows x {2 if fp16 else 4} bytes"
        raise BadFile(path, found, expected, "check --dstore-size and --dstore-fp16")
    if fp16 is None and fallback_dimension and row_bytes in (4 * fallback_dimension, 2 * fallback_dimension):
        return fallback_dimension, row_bytes // fallback_dimension
    if fp16 is None:
        start = np.fromfile(path, KEY_DTYPES[2], count=min(key_bytes // 2, SCAN_ROWS))
        fp16 = row_bytes % 4 != 0 or bool(np.isfinite(start).all())  # halves of float32 numbers are often infinite
    itemsize = 2 if fp16 else 4
    precision = "half" if fp16 else "single"
    logger.warning("%s: taken for keys of dimension %d in %s precision", path, row_bytes // itemsize, precision)
    return row_bytes // itemsize, itemsize


def _value_layout(prefix: str, value_bytes: int, size: int | None) -> tuple[int, str]:
    """Rows and dtype of a values file without a sidecar, which without a size follow from a look at its numbers."""
    if size is None:
        itemsize = _value_itemsize(values_path(prefix))
        if value_bytes % itemsize:
            expected = f"a multiple of {itemsize} (int{8 * itemsize})"
            raise BadFile(values_path(prefix), f"{value_bytes} bytes", expected, "give --dstore-size")
        return value_bytes // itemsize, VALUE_DTYPES[itemsize]
    if size > 0 and value_bytes % size == 0 and value_bytes // size in VALUE_DTYPES:
        return size, VALUE_DTYPES[value_bytes // size]
    if value_bytes >= size * 8 and value_bytes % 8 == 0:  # only the first rows are asked for
        return value_bytes // 8, VALUE_DTYPES[8]
    raise BadFile(
        values_path(prefix),
        f"{value_bytes} bytes",
        f"{size * 8} bytes (int64), {size * 4} (int32) or {size * 2} (int16) for {size} entries",
        "check --dstore-size",
    )


def _value_itemsize(path: str) -> int:
    """8, 4 or 2 bytes: the widest type as which the file begins with plausible token numbers. Neighbours read as one
    number of twice the width are far larger than any vocabulary."""
    start = np.fromfile(path, np.uint8, count=8 * SCAN_ROWS)
    for itemsize, limit in ((8, 1 << 31), (4, LARGEST_VOCABULARY)):
        numbers = start[: len(start) // itemsize * itemsize].view(VALUE_DTYPES[itemsize])
        if ((numbers >= 0) & (numbers < limit)).all():
            return itemsize
    return 2


def _checked_against_sidecar(
    prefix: str,
    info: dict[str, Any],
    size: int | None,
    dimension: int | None,
    fp16: bool | None,
    value_bytes: int,
    key_bytes: int | None,
) -> _Layout:
    rows, width, key_dtype, value_dtype = (info[name] for name in ("rows", "dimension", "key_dtype", "value_dtype"))
    if key_dtype not in KEY_DTYPES.values() or value_dtype not in VALUE_DTYPES.values():
        raise BadFile(prefix + ".json", f"types {key_dtype} and {value_dtype}", "known types of keys and values")
    wanted = {values_path(prefix): (value_bytes, rows * np.dtype(value_dtype).itemsize)}
    if key_bytes is not None:
        wanted[keys_path(prefix)] = (key_bytes, rows * width * np.dtype(key_dtype).itemsize)
    for path, (found, expected) in wanted.items():
        if found != expected:
            raise BadFile(path, f"{found} bytes", f"{expected} bytes as {prefix}.json says", "save the datastore again")
    if size is not None and size > rows:
        raise BadFlag("--dstore-size", size, f"at most the {rows} entries of {prefix}", "leave the flag out")
    if dimension is not None and dimension != width:
        keys = f"keys of dimension {width}"
        raise BadFile(prefix + ".json", keys, f"dimension {dimension}", "check which model made it")
    if fp16 and key_dtype != KEY_DTYPES[2]:
        raise BadFlag("--dstore-fp16", f"single-precision keys in {prefix}", "half-precision keys", "drop the flag")
    return _Layout(rows, width, key_dtype if key_bytes is not None else None, value_dtype)


def count_filled_rows(datastore: Datastore) -> int:
    """Rows before the all-zero tail that writers leave when they allocate more than they fill (Law-MT: 19,847 rows).

    A row counts as empty when its key is all zeros and its value is 0."""
    keys = datastore.require_keys("finding the filled rows")
    end = datastore.size
    while end > 0:
        start = max(0, end - SCAN_ROWS)
        filled = np.flatnonzero((datastore.values[start:end] != 0) | (keys[start:end] != 0).any(axis=1))
        if len(filled):
            return start + int(filled[-1]) + 1
        end = start
    return 0
