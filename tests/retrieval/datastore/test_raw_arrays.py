"""Layouts inferred from bytes: every combination of types is detected, whatever flags are given, and never another
one."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.sidecar import write_sidecar
from fairseq.retrieval.datastore import Datastore

ROWS, WIDTH, WORDS = 1200, 24, 900
VALUES, KEYS = ("<i8", "<i4", "<i2"), ("<f2", "<f4")
TOLD: dict[str, dict[str, int]] = {
    "nothing": {},
    "the size": {"size": ROWS},
    "a smaller size": {"size": ROWS // 3},
    "half the size": {"size": ROWS // 2},
    "the width": {"dimension": WIDTH},
    "both": {"size": ROWS, "dimension": WIDTH},
    "a smaller size and the width": {"size": 500, "dimension": WIDTH},
}
SIZES = {"usual": 1.0, "small": 1e-3, "large": 300.0}


def arrays(scale: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys are rounded to half precision, as those of a float32 file may be too."""
    rng = np.random.default_rng(seed)
    keys = (scale * rng.standard_normal((ROWS, WIDTH))).astype("<f2").astype("<f4")
    return keys, rng.integers(4, WORDS, ROWS)


def write(folder: Path, keys: np.ndarray, values: np.ndarray, headers: bool = False) -> str:
    if headers:
        np.save(folder / "d_keys.npy", keys)
        np.save(folder / "d_vals.npy", values.reshape(-1, 1))
    else:
        keys.tofile(folder / "d_keys.npy")
        values.tofile(folder / "d_vals.npy")
    return str(folder / "d")


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("headers", [False, True])
def test_types_are_told_from_bytes(tmp_path: Path, told: str, headers: bool) -> None:
    for value_type, key_type, scale in itertools.product(VALUES, KEYS, SIZES.values()):
        keys, values = arrays(scale)
        prefix = write(tmp_path, keys.astype(key_type), values.astype(value_type), headers)
        store = Datastore.open(prefix, **TOLD[told])
        rows = TOLD[told].get("size", ROWS)
        assert store.values.dtype == value_type and store.require_keys("this").dtype == key_type
        np.testing.assert_array_equal(store.values, values[:rows])
        np.testing.assert_array_equal(store.keys, keys[:rows])


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("value_type", ["<f4", "<f8", ">i8", ">i4"])
def test_values_of_other_types_are_refused(tmp_path: Path, told: str, value_type: str) -> None:
    keys, values = arrays()
    prefix = write(tmp_path, keys.astype("<f2"), values.astype(value_type))
    with pytest.raises(UserError, match=r"d_vals.npy|d_keys.npy"):
        Datastore.open(prefix, **TOLD[told])


@pytest.mark.parametrize("change", [lambda v: v - 2000, lambda v: v * -1, lambda v: v + (1 << 40)])
def test_values_that_are_no_tokens_are_refused(tmp_path: Path, change: Any) -> None:
    keys, values = arrays()
    for told, value_type in itertools.product(TOLD.values(), ("<i8", "<i4")):
        prefix = write(tmp_path, keys.astype("<f2"), change(values).astype("<i8").astype(value_type))
        if value_type == "<i4" and change(values).max() > 1 << 32:
            continue  # what is left in 32 bits is a token again
        with pytest.raises(BadFile, match="token numbers from 0 on"):
            Datastore.open(prefix, **told)


@pytest.mark.parametrize("key_type", [">f2", ">f4", "<f8"])
@pytest.mark.parametrize("told", ["nothing", "the size", "twice the width"])
def test_keys_of_other_types_are_refused(tmp_path: Path, key_type: str, told: str) -> None:
    keys, values = arrays()
    prefix = write(tmp_path, keys.astype(key_type), values)
    itemsize = np.dtype(key_type).itemsize
    width = {"twice the width": WIDTH * itemsize // (2 if key_type == ">f2" else 4)}.get(told)
    with pytest.raises(BadFile, match="d_keys.npy: found numbers that are those of vectors as"):
        Datastore.open(prefix, ROWS if told == "the size" else None, width)


@pytest.mark.parametrize("keys", [np.zeros((ROWS, WIDTH), "<f2"), np.ones((ROWS, WIDTH), "<f4")])
def test_bytes_that_do_not_tell_need_the_width(tmp_path: Path, keys: np.ndarray) -> None:
    prefix = write(tmp_path, keys, arrays()[1])
    with pytest.raises(BadFlag, match="--dimension: found nothing"):
        Datastore.open(prefix)
    assert Datastore.open(prefix, dimension=WIDTH).require_keys("this").dtype == keys.dtype


def test_a_guess_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, values = arrays()
    prefix = write(tmp_path, keys.astype("<f2"), values)
    with caplog.at_level(logging.WARNING):
        Datastore.open(prefix)
        assert f"it is read as {ROWS} int64 values and keys of dimension {WIDTH} in float16" in caplog.text
        caplog.clear()
        Datastore.open(prefix, ROWS, WIDTH)
        Datastore.open(prefix, None, WIDTH)
        Datastore.open(prefix, ROWS, fp16=True)
    assert caplog.text == ""


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_other_containers_are_named(tmp_path: Path, save: Any) -> None:
    keys, values = arrays()
    prefix = write(tmp_path, keys.astype("<f2"), values)
    with open(tmp_path / "d_vals.npy", "wb") as stream:
        save(stream, values)
    with pytest.raises(BadFile, match="d_vals.npy: found a zip archive"):
        Datastore.open(prefix, ROWS, WIDTH)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((ROWS, 2), "<i8"), r"an array of type <i8 and shape \(1200, 2\)"),
        (np.zeros(ROWS, "<f4"), "an array of type <f4"),
        (np.zeros(ROWS, ">i8"), "an array of type >i8"),
        (np.zeros(ROWS, "<u8"), "an array of type <u8"),
        (np.full(ROWS, -5), "numbers from -5 to -5"),
    ],
)
def test_headers_of_other_arrays_are_refused(tmp_path: Path, values: np.ndarray, says: str) -> None:
    prefix = write(tmp_path, arrays()[0].astype("<f2"), arrays()[1])
    np.save(tmp_path / "d_vals.npy", values)
    with pytest.raises(BadFile, match=says):
        Datastore.open(prefix, dimension=WIDTH)


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, -3e38, 1e19])
@pytest.mark.parametrize("row", [0, 17, ROWS - 1])
def test_keys_that_cannot_be_compared_name_their_row(tmp_path: Path, number: float, row: int) -> None:
    keys, values = arrays()
    keys[row, 3] = number
    store = Datastore.open(write(tmp_path, keys, values), ROWS, WIDTH)
    for rows in (slice(None), slice(row, row + 1), np.array([row])):
        with pytest.raises(BadFile, match=f"d_keys.npy: found the key of row {row}, which"):
            store.read_keys(rows)
    assert len(store.read_keys(np.setdiff1d(np.arange(ROWS), [row]))) == ROWS - 1


@pytest.mark.parametrize(("number", "fine"), [(WORDS - 1, True), (WORDS, False)])
def test_words_are_those_of_the_dictionary(tmp_path: Path, number: int, fine: bool) -> None:
    keys, values = arrays()
    values[ROWS // 2] = number
    store = Datastore.open(write(tmp_path, keys, values), ROWS, WIDTH)
    if fine:
        store.check_words(WORDS)
        return
    with pytest.raises(BadFile, match=f"found values from 4 to {WORDS}, expected words .* 0 to {WORDS - 1}"):
        store.check_words(WORDS)


def test_numbers_that_do_not_fit_32_bits_are_not_wrapped(tmp_path: Path) -> None:
    """In memory, values are int32 where they fit."""
    keys, values = arrays()
    fields = {"rows": ROWS, "dimension": WIDTH, "key_dtype": "<f4", "value_dtype": "<i8"}
    write_sidecar(str(tmp_path / "d"), "datastore", fields)
    values[5] = -(1 << 32) + 7
    store = Datastore.open(write(tmp_path, keys, values), in_memory=True)
    with pytest.raises(BadFile, match=f"found values from {values[5]} to"):
        store.check_words(WORDS)
