"""The datastore: one (key, value) pair per token of a text. Keys are the language model's activations, values the
tokens that followed. Entry i + 1 is the entry that follows entry i in the text, so a pointer needs no storage.

Files (the RetoMaton layout): `PREFIX_keys.npy` and `PREFIX_vals.npy` are raw row-major arrays without a numpy header,
keys (N, D) float16 or float32, values (N, 1) int64 (other tools: int32 or int16). The sidecar `PREFIX.json` describes
them; without it, `layout` infers their types from the bytes."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile, BadFlag
from fairseq.files.checksums import check_opened
from fairseq.files.inputs import regular_size
from fairseq.files.sidecar import read_sidecar
from fairseq.retrieval.datastore.layout import GivenLayout, infer_layout, keys_path, values_path, weights_path
from fairseq.retrieval.datastore.raw_arrays import number_bytes, read_header

logger = logging.getLogger(__name__)

KIND = "datastore"
SCAN_ROWS = 65536
SCAN_VALUES = 1 << 22
LARGEST_WEIGHT = 1 << 40
LARGEST_SQUARE = 8e37  # largest squared norm of keys whose squared distances do not overflow in float32


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

    @functools.cached_property
    def filled(self) -> int:
        """Number of rows before the all-zero rows at the end; all rows when the keys are not open. See
        `count_filled_rows`."""
        return self.size if self.keys is None else count_filled_rows(self)

    def without_empty_rows(self, purpose: str) -> Datastore:
        """The datastore without the all-zero rows at its end, which are not entries. A warning says how many rows are
        left out, and of what (`purpose`)."""
        if self.filled == self.size:
            return self
        empty = self.size - self.filled
        logger.warning("%s: the last %d rows are all zero and are left out of %s", self.prefix, empty, purpose)
        keys = None if self.keys is None else self.keys[: self.filled]
        return replace(self, keys=keys, values=self.values[: self.filled])

    def read_keys(self, rows: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        """See `read_keys`."""
        return read_keys(self.require_keys("reading them"), rows, keys_path(self.prefix))

    def check_words(self, vocabulary: int | None) -> None:
        """BadFile unless every value is a word of a dictionary of `vocabulary` words (None: unknown, so that values
        only must not be negative). Reads all values."""
        least, most = value_range(self.values)
        if least >= 0 and (vocabulary is None or most < vocabulary):
            return
        range_text = f" of the dictionary, 0 to {vocabulary - 1}" if vocabulary is not None else ", from 0 on"
        found = f"values from {least} to {most}"
        remedy = "give the datastore that was saved with this dictionary, and check --dstore-size"
        raise BadFile(values_path(self.prefix), found, f"words{range_text}", remedy)

    @classmethod
    def open(
        cls,
        prefix: str,
        size: int | None = None,
        dimension: int | None = None,
        fp16: bool | None = None,
        load_keys: bool = True,
        in_memory: bool = False,
    ) -> Datastore:
        """Opens `PREFIX_keys.npy` and `PREFIX_vals.npy`, as read-only memory maps or (`in_memory`) as copies.

        Size, dimension and types come from the sidecar, else from the arguments and the files' bytes, which must agree
        (BadFile). A `size` below the number of rows opens only the first `size` rows."""
        info = read_sidecar(prefix, KIND, {"rows": int, "dimension": int, "key_dtype": str, "value_dtype": str}) or {}
        layout = infer_layout(prefix, info, GivenLayout(size, dimension, fp16), load_keys)
        rows = layout.rows if size is None else size
        if rows < layout.rows:
            logger.warning("%s: the first %d of its %d entries, as --dstore-size says", prefix, rows, layout.rows)
        files = {"values": values_path(prefix)}
        if load_keys and layout.key_dtype is not None:
            files["keys"] = keys_path(prefix)
        check_opened(prefix, files)
        values = _map(values_path(prefix), layout.value_dtype, (layout.rows, 1), layout.value_offset)[:rows, 0]
        keys = None
        if load_keys and layout.key_dtype is not None and layout.dimension is not None:
            shape = (layout.rows, layout.dimension)
            keys = _map(keys_path(prefix), layout.key_dtype, shape, layout.key_offset)[:rows]
        if in_memory:
            narrow, (least, most) = np.iinfo(np.int32), value_range(values)
            values = values.astype(np.int32 if narrow.min <= least and most <= narrow.max else np.int64)
            keys = None if keys is None else np.array(keys)
        return cls(prefix, keys, values, layout.dimension, info)


def _map(path: str, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape, offset=offset)


def value_range(values: NDArray[Any]) -> tuple[int, int]:
    """The smallest and the largest of values (N,), read part by part; (0, 0) when there are none."""
    parts = [values[start : start + SCAN_VALUES] for start in range(0, len(values), SCAN_VALUES)]
    ranges = [(int(part.min()), int(part.max())) for part in parts]
    return min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)


def read_keys(keys: NDArray[Any], rows: slice | NDArray[np.integer], source: str) -> NDArray[np.float32]:
    """(n, D) float32: the given `rows` of keys (N, D) from the file `source`. BadFile names the first key that is not
    finite, or so large that distances to it overflow: FAISS ends the process for such keys, or gives arbitrary
    results."""
    some = np.asarray(keys[rows], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        fine = np.einsum("nd,nd->n", some, some) <= LARGEST_SQUARE
    if not fine.all():
        place = int(fine.argmin())
        row = range(len(keys))[rows][place] if isinstance(rows, slice) else int(rows[place])
        largest = float(np.abs(some[place]).max())
        what = "is not finite" if not np.isfinite(largest) else f"reaches {largest:.2g}, too much to square"
        raise BadFile(source, f"the key of row {row}, which {what}", "keys of finite size", "save the datastore again")
    return some


def read_weights(datastore: Datastore) -> NDArray[np.int64]:
    """(N,): the weights of a merged datastore, that is, how many original entries were merged into each entry; BadFile
    unless all are at least 1."""
    path, remedy = weights_path(datastore.prefix), "merge again with fairseq-greedy-merge"
    regular_size(path, "merge with fairseq-greedy-merge, or drop --dstore-weights")
    rows = int(datastore.info.get("rows", datastore.size))
    header = read_header(path)
    found = number_bytes(path, header)
    if (header is not None and header.dtype != "<i8") or found != rows * 8:
        kind = "" if header is None else f" of type {header.dtype} behind a NumPy header"
        raise BadFile(path, f"{found} bytes{kind}", f"{rows * 8} (int64) for {rows} entries", remedy)
    check_opened(datastore.prefix, {"weights": path}, whole=True)
    weights = np.fromfile(path, "<i8", datastore.size, offset=0 if header is None else header.offset)
    if weights.min(initial=1) < 1 or weights.max(initial=1) > LARGEST_WEIGHT:
        found_range = f"weights from {weights.min()} to {weights.max()}"
        raise BadFile(path, found_range, f"int64 weights of at least 1 and at most {LARGEST_WEIGHT}", remedy)
    return weights


def count_filled_rows(datastore: Datastore) -> int:
    """Number of rows before the all-zero rows at the end, which exist when a writer allocates more rows than it fills
    (Law-MT: 19,847 rows).

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
