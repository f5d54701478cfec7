"""Progress files: an unfinished run is continued only if its progress file is of the same run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairseq.files.array_stream import rows_done
from fairseq.files.outputs import PROGRESS, check_files
from fairseq.files.progress import read_progress, rows_noted, write_progress
from fairseq.retrieval.datastore.writer import DatastoreWriter
from tests.fuzz.mutation import mutate


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "7", '"text"', "null"])
def test_a_file_that_says_nothing_is_a_start_from_the_beginning(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.progress.json"
    if content is not None:
        path.write_text(content)
    assert read_progress(str(path)) == {}
    assert rows_done(str(path), {"model": "a"}, 2) == (0, ["", ""])


@pytest.mark.parametrize(
    "noted, rows", [(5, 5), (0, 0), (-3, 0), (2.5, 0), ("5", 0), (None, 0), (True, 0), ([5], 0)], ids=repr
)
def test_only_numbers_of_rows_count(noted: object, rows: int) -> None:
    assert rows_noted({"written": noted}, "written") == rows
    assert rows_noted({}, "written") == 0


def test_rows_of_another_run_do_not_count(tmp_path: Path) -> None:
    path, digests = tmp_path / "x.progress.json", ["ab", "cd"]
    path.write_text(json.dumps({"model": "a", "k": 8, "rows": 40, "digests": digests}))
    assert rows_done(str(path), {"model": "a", "k": 8}, 2) == (40, digests)
    for other in ({"model": "b", "k": 8}, {"model": "a"}, {"model": "a", "k": 8, "seed": 1}, {}):
        assert rows_done(str(path), other, 2) == (0, ["", ""])
    assert rows_done(str(path), {"model": "a", "k": 8}) == (0, [""])  # of another number of streams


def test_a_damaged_file_is_said_and_never_continued_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, description = tmp_path / "x.progress.json", {"model": "a"}
    state = {**description, "rows": 40, "digests": ["ab"]}
    write_progress(str(path), state)
    assert read_progress(str(path)) == state and rows_done(str(path), description) == (40, ["ab"])
    whole = path.read_bytes()
    for seed in range(200):
        path.write_bytes(mutate(seed, whole))
        check_files("--flag", {str(path): PROGRESS})
        caplog.clear()
        rows, digests = rows_done(str(path), description)
        assert (rows, digests) == (40, ["ab"]) or (rows == 0 and "from the beginning" in caplog.text), seed


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 300, b'{"identity": {"a": 2}, "written": 3, "digests": []}'])
def test_a_datastore_begins_again(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def writer() -> DatastoreWriter:
        return DatastoreWriter(str(tmp_path / "d"), 5, 2, False, {"a": 1})

    first = writer()
    first.append(np.ones((3, 2), np.float32), np.arange(3))
    first.close()
    (tmp_path / "d.progress.json").write_bytes(content)
    again = writer()
    assert again.written == 0
    again.close()
    assert "from the beginning" in caplog.text
