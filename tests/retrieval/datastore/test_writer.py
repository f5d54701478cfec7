"""Writing datastores: bytes, padding, and continuing after a kill at any instant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairseq.errors import UserError
from fairseq.files.atomic_io import temporary_path
from fairseq.retrieval.datastore import Datastore, count_filled_rows
from fairseq.retrieval.datastore.writer import DatastoreWriter
from tests.processes import die

ROWS, DIMENSION = 100, 4
RNG = np.random.default_rng(0)
KEYS = RNG.standard_normal((ROWS, DIMENSION)).astype(np.float32)
VALUES = RNG.integers(1, 300_000, ROWS)
IDENTITY = {"model": "a", "context_window": 3}


def start(folder: Path, fp16: bool = True, **identity: object) -> DatastoreWriter:
    return DatastoreWriter(str(folder / "store"), ROWS, DIMENSION, fp16, {**IDENTITY, **identity})


def write(writer: DatastoreWriter, end: int = ROWS, step: int = 9) -> None:
    """Appends what is missing up to row `end`, in pieces."""
    while writer.written < end:
        rows = slice(writer.written, min(writer.written + step, end))
        writer.append(KEYS[rows], VALUES[rows])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "whole"
    writer = start(folder)
    write(writer)
    writer.finish({"split": "train"})
    return content(folder)


def test_bytes(uninterrupted: dict[str, bytes]) -> None:
    assert sorted(uninterrupted) == ["store.json", "store_keys.npy", "store_vals.npy"]
    assert uninterrupted["store_keys.npy"] == KEYS.astype("<f2").tobytes()
    assert uninterrupted["store_vals.npy"] == VALUES.astype("<i8").tobytes()
    description = json.loads(uninterrupted["store.json"])
    assert description["rows"] == description["filled_rows"] == ROWS
    assert (description["dimension"], description["split"]) == (DIMENSION, "train")


def test_single_precision(tmp_path: Path) -> None:
    writer = start(tmp_path, fp16=False)
    write(writer)
    writer.finish({})
    assert (tmp_path / "store_keys.npy").read_bytes() == KEYS.astype("<f4").tobytes()


def test_a_datastore_is_replaced_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        first = start(tmp_path)
        write(first)
        first.finish({})
        assert not caplog.text
        second = start(tmp_path, split="another")
    assert "store: the datastore that is there will be replaced" in caplog.text
    second.close()
    assert (tmp_path / "store_keys.npy").read_bytes() == KEYS.astype("<f2").tobytes()


@pytest.mark.parametrize("end", [0, 1, 50, 99, 100])
def test_killed_with_warning(tmp_path: Path, end: int, uninterrupted: dict[str, bytes]) -> None:
    """An exception closes the writer; everything appended so far is kept."""
    folder = tmp_path / "resumed"
    first = start(folder)
    write(first, end)
    first.close()
    assert not (folder / "store_keys.npy").exists()
    again = start(folder)
    assert again.written == end
    write(again, step=7)
    again.finish({"split": "train"})
    assert content(folder) == uninterrupted


@pytest.mark.parametrize("flushed", [True, False])
def test_killed_without_warning(tmp_path: Path, flushed: bool, uninterrupted: dict[str, bytes]) -> None:
    """A kill leaves the last safe point and, perhaps, half a row more in the files."""
    folder = tmp_path / "resumed"
    first = start(folder)
    write(first, 40)
    first.safe_point()
    write(first, 77)
    if flushed:
        for stream in first._files:
            stream.flush()
        with open(temporary_path(folder / "store_keys.npy"), "ab") as stream:
            stream.write(b"x")
    die()
    again = start(folder)
    assert again.written == 40
    write(again)
    again.finish({"split": "train"})
    assert content(folder) == uninterrupted


@pytest.mark.parametrize("damage", ["no progress", "damaged progress", "short keys", "boastful progress", "negative"])
def test_starts_afresh_when_in_doubt(tmp_path: Path, damage: str, uninterrupted: dict[str, bytes]) -> None:
    folder = tmp_path / "resumed"
    first = start(folder)
    write(first, 60)
    first.close()
    progress = folder / "store.progress.json"
    if damage == "no progress":
        progress.unlink()
    elif damage == "damaged progress":
        progress.write_bytes(progress.read_bytes()[:10])
    elif damage == "short keys":
        path = temporary_path(folder / "store_keys.npy")
        path.write_bytes(path.read_bytes()[:100])
    else:
        written = 1000 if damage == "boastful progress" else -5
        progress.write_text(json.dumps({**json.loads(progress.read_text()), "written": written}))
    die()
    again = start(folder)
    assert again.written == 0
    write(again)
    again.finish({"split": "train"})
    assert content(folder) == uninterrupted


@pytest.mark.parametrize("change", [{"model": "b"}, {"context_window": 4}])
def test_another_model_starts_afresh(tmp_path: Path, change: dict[str, object]) -> None:
    first = start(tmp_path)
    write(first, 60)
    first.close()
    assert start(tmp_path, **change).written == 0


def test_another_type_starts_afresh(tmp_path: Path) -> None:
    first = start(tmp_path)
    write(first, 60)
    first.close()
    assert start(tmp_path, fp16=False).written == 0


def test_padded_tail(tmp_path: Path) -> None:
    """Fewer rows than requested: the rest is zero, is recorded in the sidecar, and is detected without it."""
    writer = start(tmp_path)
    write(writer, 93)
    writer.finish({})
    assert (tmp_path / "store_vals.npy").stat().st_size == ROWS * 8
    store = Datastore.open(str(tmp_path / "store"))
    assert store.info["filled_rows"] == count_filled_rows(store) == 93
    assert store.size == ROWS


def test_more_than_fits_is_cut(tmp_path: Path) -> None:
    writer = DatastoreWriter(str(tmp_path / "store"), 10, DIMENSION, True, {})
    writer.append(KEYS[:8], VALUES[:8])
    assert writer.rows_left == 2
    writer.append(KEYS[8:20], VALUES[8:20])
    writer.append(KEYS[20:], VALUES[20:])
    assert writer.rows_left == 0
    writer.finish({})
    np.testing.assert_array_equal(Datastore.open(str(tmp_path / "store")).values, VALUES[:10])


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_keys_must_be_finite(tmp_path: Path, value: float) -> None:
    """70,000 is beyond half precision."""
    writer = start(tmp_path)
    keys = KEYS[:3].copy()
    keys[1, 2] = value
    with np.errstate(over="ignore"), pytest.raises(UserError, match="store_keys.npy: a key near row 0 is infinite"):
        writer.append(keys, VALUES[:3])


def test_old_description_never_stands_beside_new_files(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    (tmp_path / "store.json").write_text('{"kind": "datastore", "rows": 5}')
    writer = start(tmp_path)
    write(writer)
    writer.finish({"split": "train"})
    assert (tmp_path / "store.json").read_bytes() == uninterrupted["store.json"]
