"""Opening datastores of every origin: with and without a sidecar, and those whose files do not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.errors import BadFile, UserError
from fairseq.retrieval.datastore import Datastore, count_filled_rows
from fairseq.retrieval.datastore.writer import DatastoreWriter
from tests.descriptions import edit_description

ROWS, DIMENSION = 37, 6


def arrays(value_dtype: str = "<i8", key_dtype: str = "<f2") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((ROWS, DIMENSION)).astype(key_dtype)
    return keys, rng.integers(1, 30000, ROWS).astype(value_dtype)


def downloaded(folder: Path, value_dtype: str = "<i8", key_dtype: str = "<f2") -> str:
    """Two raw files with nothing beside them."""
    keys, values = arrays(value_dtype, key_dtype)
    keys.tofile(folder / "store_keys.npy")
    values.tofile(folder / "store_vals.npy")
    return str(folder / "store")


def saved(folder: Path, fp16: bool = True) -> str:
    """Written by this project, with its description."""
    keys, values = arrays()
    writer = DatastoreWriter(str(folder / "store"), ROWS, DIMENSION, fp16, {})
    writer.append(keys.astype(np.float32), values)
    writer.finish({})
    return str(folder / "store")


@pytest.mark.parametrize("value_dtype", ["<i8", "<i4", "<i2"])
@pytest.mark.parametrize("key_dtype", ["<f2", "<f4"])
def test_types_follow_from_lengths(tmp_path: Path, value_dtype: str, key_dtype: str) -> None:
    prefix = downloaded(tmp_path, value_dtype, key_dtype)
    keys, values = arrays(value_dtype, key_dtype)
    for in_memory in (False, True):
        store = Datastore.open(prefix, ROWS, DIMENSION, in_memory=in_memory)
        assert (store.size, store.dimension, store.info) == (ROWS, DIMENSION, {})
        np.testing.assert_array_equal(store.values, values)
        np.testing.assert_array_equal(store.require_keys("this test"), keys)
        assert store.require_keys("this test").dtype == keys.dtype


def test_size_follows_from_length(tmp_path: Path) -> None:
    """RetoMaton's own files hold int64 values, so nothing need be said about them."""
    store = Datastore.open(downloaded(tmp_path), dimension=DIMENSION)
    assert store.size == ROWS
    assert store.keys is not None
    assert store.keys.shape == (ROWS, DIMENSION)


def test_dimension_follows_from_length(tmp_path: Path) -> None:
    store = Datastore.open(downloaded(tmp_path), fp16=True)
    assert store.dimension == DIMENSION


def test_first_rows_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for prefix in (downloaded(tmp_path), saved(tmp_path)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            store = Datastore.open(prefix, 30, DIMENSION)
        assert f"store: the first 30 of its {ROWS} entries" in caplog.text
        assert store.size == 30
        assert store.keys is not None
        np.testing.assert_array_equal(store.values, arrays()[1][:30])
        np.testing.assert_array_equal(store.keys, arrays()[0][:30])


def test_without_keys(tmp_path: Path) -> None:
    prefix = downloaded(tmp_path)
    (tmp_path / "store_keys.npy").unlink()
    store = Datastore.open(prefix, load_keys=False)
    np.testing.assert_array_equal(store.values, arrays()[1])
    with pytest.raises(UserError, match="--no-load-keys"):
        store.require_keys("this test")
    with pytest.raises(UserError, match="store_keys.npy: no such file"):
        Datastore.open(prefix, dimension=DIMENSION)


@pytest.mark.parametrize("fp16", [True, False])
def test_description_says_everything(tmp_path: Path, fp16: bool) -> None:
    store = Datastore.open(saved(tmp_path, fp16))
    assert (store.size, store.dimension) == (ROWS, DIMENSION)
    assert store.keys is not None
    assert store.keys.dtype == (np.float16 if fp16 else np.float32)
    np.testing.assert_array_equal(store.keys, arrays()[0])
    np.testing.assert_array_equal(store.values, arrays()[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": ROWS + 1, "dimension": DIMENSION}, r"store_vals.npy: found 296 bytes, expected 304 .*--dstore-size"),
        ({"size": ROWS, "dimension": DIMENSION + 1}, r"store_keys.npy: found 444 bytes, expected \d+ bytes"),
        ({"size": ROWS, "dimension": 4 * DIMENSION}, r"store_keys.npy: found 444 bytes"),
        ({"dimension": 5}, r"store_keys.npy: found 444 bytes"),
        ({"fp16": False}, r"store_keys.npy: found numbers that are those of vectors as float16"),
    ],
)
def test_what_is_given_must_fit(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    prefix = downloaded(tmp_path)
    with pytest.raises(BadFile, match=sentence) as caught:
        Datastore.open(prefix, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["keys", "vals"])
@pytest.mark.parametrize("described", [True, False])
def test_truncated(tmp_path: Path, name: str, described: bool) -> None:
    prefix = saved(tmp_path) if described else downloaded(tmp_path)
    path = tmp_path / f"store_{name}.npy"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadFile, match=f"store_{name}.npy: found {path.stat().st_size} bytes"):
        Datastore.open(prefix, None, DIMENSION)


@pytest.mark.parametrize("parts", [2, 4])
def test_values_cut_to_the_length_of_a_narrower_type(tmp_path: Path, parts: int) -> None:
    """Half of an int64 file is as long as a whole int32 file: told apart by the empty upper halves."""
    prefix = downloaded(tmp_path)
    path = tmp_path / "store_vals.npy"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // parts])
    with pytest.raises(BadFile, match="store_vals.npy: found .* cut short"):
        Datastore.open(prefix, ROWS, DIMENSION)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": ROWS + 1}, f"--dstore-size: found {ROWS + 1}, expected at most the {ROWS} entries"),
        ({"dimension": 7}, "found keys of dimension 6, expected dimension 7"),
    ],
)
def test_what_is_given_must_fit_the_description(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Datastore.open(saved(tmp_path), **arguments)


def test_fp16_flag_against_the_description(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dstore-fp16"):
        Datastore.open(saved(tmp_path, fp16=False), fp16=True)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "index"},
        {"rows": -1},
        {"rows": "37"},
        {"rows": True},
        {"key_dtype": "<f8"},
        {"value_dtype": "|O"},
        {"format_version": 99},
        {"dimension": None},
    ],
    ids=str,
)
def test_damaged_description(tmp_path: Path, change: dict[str, Any]) -> None:
    prefix = saved(tmp_path)
    path = tmp_path / "store.json"
    edit_description(path, **change)
    with pytest.raises(BadFile, match="store.json"):
        Datastore.open(prefix)
    path.write_text("{")
    with pytest.raises(BadFile, match="store.json"):
        Datastore.open(prefix)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere_vals.npy: no such file"):
        Datastore.open(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("filled", [0, 1, 20, ROWS])
def test_filled_rows(tmp_path: Path, filled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero rows at the end are found, also across the borders of the scan; zero rows amid others are not the end."""
    keys, values = arrays()
    keys[filled:], values[filled:] = 0, 0
    if filled > 5:
        keys[2:5], values[2:5] = 0, 0
    if filled > 1:
        keys[filled - 1] = 0  # a value alone is enough
    keys.tofile(tmp_path / "store_keys.npy")
    values.tofile(tmp_path / "store_vals.npy")
    store = Datastore.open(str(tmp_path / "store"), ROWS, DIMENSION)
    assert count_filled_rows(store) == filled
    monkeypatch.setattr("fairseq.retrieval.datastore.reader.SCAN_ROWS", 7)
    assert count_filled_rows(store) == filled
