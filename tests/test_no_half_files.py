"""A full disk, a limit on file sizes, a folder that cannot be written, Ctrl-C, a plan that does not fit: one sentence,
a status other than 0, and what was there before is as it was."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fairseq import refusals
from fairseq.errors import UserError
from fairseq.files.atomic_io import write_json
from tests.kill.stages import GOLDEN, STAGES, load_command, run_command

FAILING = ["preprocess", "train", "save datastore", "build index", "k-means", "two-level k-means", "greedy merging"]
TRAINED = {"out/i.trained", "out/i.trained.json"}  # an intermediate result, which another recipe's replaces
PREPROCESS_AGAIN = " --srcdict out/dict.txt"  # a second run over what is there


def flags_of(name: str) -> str:
    return STAGES[name].flags


def in_child(command: str, flags: str, folder: Path, before: Callable[[], object]) -> tuple[int, str]:
    """Runs a command in a child process; returns its status and what it said. `before` runs right before it."""
    reading, writing = os.pipe()  # not a file, which a limit would cut too
    child = multiprocessing.get_context("fork").Process(target=_child, args=(command, flags, folder, before, writing))
    child.start()
    os.close(writing)
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(iter(lambda: os.read(reading, 1 << 16), b"")))
    reader.start()
    child.join(120)
    assert child.exitcode is not None, "the command hangs"
    reader.join(10)
    os.close(reading)
    return child.exitcode, b"".join(said).decode()


def _child(command: str, flags: str, folder: Path, before: Callable[[], object], log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    load_command(command)  # Python's own files are no part of what is limited
    before()
    run_command(command, flags, folder)


def one_sentence(text: str) -> str:
    assert "Traceback" not in text and "Exception ignored" not in text, text
    sentences = [line for line in text.splitlines() if ": error: " in line]
    assert len(sentences) == 1, text
    return sentences[0]


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".log") and "tmp" not in name}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    """Which of the files from before are gone or others."""
    return {name for name, content in before.items() if after.get(name) != content}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """finished(stage): a folder in which the stage has been run once."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("done") / "job"
            folder.mkdir()
            STAGES[name].prepare(folder)
            status, text = in_child(STAGES[name].command, flags_of(name), folder, lambda: None)
            assert status == 0, text
            done[name] = folder
        return done[name]

    return make


@pytest.fixture
def again(finished: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """again(stage): a copy of that folder, and flags of a second run that would replace everything."""

    def make(name: str) -> tuple[Path, str]:
        folder = tmp_path / "job"
        shutil.copytree(finished(name), folder)
        flags = flags_of(name)
        if name == "preprocess":
            flags += PREPROCESS_AGAIN
        if name == "build index":
            flags += " --seed 5"
        if name == "train":
            flags = flags.replace("--max-update 90", "--max-update 99")
        return folder, flags

    return make


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("limit", [0, 1 << 9, 20_000])
def test_a_limit_on_file_sizes(name: str, limit: int, again: Any) -> None:
    folder, flags = again(name)
    before = contents(folder)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, text = in_child(STAGES[name].command, flags, folder, limited)
    if status == 0:
        assert limit == 20_000  # some files are smaller than that
        return
    assert status == 2, text
    sentence = one_sentence(text)
    assert "File too large" in sentence or "cannot be written" in sentence or "could not write" in sentence
    assert "out/" in sentence  # the file is named
    assert changed(before, contents(folder)) <= TRAINED


def mount(*arguments: str) -> bool:
    """Whether this mount works here: it needs a privileged user."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("size=1m"): a folder on a disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(options: str) -> Path:
        if not mount("-t", "tmpfs", "-o", options, "tmpfs", str(place)):
            pytest.skip("mounting is not permitted here; the limit on file sizes is tested instead")
        return place

    yield make
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def job_on(disk: Path, name: str, tmp_path: Path) -> Path:
    """A folder in which the stage can run, whose output goes to `disk`."""
    folder = tmp_path / "job"
    folder.mkdir()
    STAGES[name].prepare(folder)
    (folder / "out").symlink_to(disk)
    return folder


FULL = [("preprocess", "4k"), ("preprocess", "1200k"), ("train", "200k"), ("k-means", "80k"), ("k-means", "20k")]
FULL += [("two-level k-means", "300k"), ("greedy merging", "1800k"), ("AdaptRet", "40k"), ("sweep", "40k")]


@pytest.mark.parametrize(("name", "size"), FULL)
def test_a_full_disk(name: str, size: str, small_disk: Any, tmp_path: Path) -> None:
    disk = small_disk(f"size={size}")
    folder = job_on(disk, name, tmp_path)
    status, text = in_child(STAGES[name].command, flags_of(name), folder, lambda: None)
    assert status == 2, text
    assert "No space left on device" in one_sentence(text) or "free some space" in one_sentence(text)
    assert re.search(r"\b(out|disk)/", one_sentence(text))  # the file is named


@pytest.mark.parametrize("name", ["save datastore", "build index"])
def test_a_plan_larger_than_the_disk(name: str, small_disk: Any, tmp_path: Path) -> None:
    """Refused before any work."""
    disk = small_disk("size=40k")
    folder = job_on(disk, name, tmp_path)
    status, text = in_child(STAGES[name].command, flags_of(name), folder, lambda: None)
    assert status == 2, text
    assert "kB free; free some space" in one_sentence(text)
    status, text = in_child(STAGES[name].command, flags_of(name) + " --force", folder, lambda: None)
    assert status == 2 and "--force: continuing although" in text
    assert "cannot be written" in one_sentence(text) or "could not write" in one_sentence(text)


@pytest.mark.parametrize("name", FAILING)
def test_a_folder_that_cannot_be_written(name: str, small_disk: Any, tmp_path: Path) -> None:
    disk = small_disk("size=8m")
    (disk / "old").write_text("old")
    if not mount("-o", "remount,ro", str(disk)):
        pytest.skip("remounting is not permitted here")
    folder = job_on(disk, name, tmp_path)
    status, text = in_child(STAGES[name].command, flags_of(name), folder, lambda: None)
    assert status == 2, text
    assert "out" in one_sentence(text) and "ead-only file system" in one_sentence(text)
    assert [path.name for path in disk.iterdir()] == ["old"]


@pytest.mark.parametrize("name", FAILING)
def test_a_folder_that_is_a_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    STAGES[name].prepare(folder)
    (folder / "out").write_text("old")
    status, text = in_child(STAGES[name].command, flags_of(name), folder, lambda: None)
    assert status == 2, text
    assert "out" in one_sentence(text)
    assert (folder / "out").read_text() == "old"


@pytest.mark.parametrize("name", FAILING)
def test_control_c(name: str, again: Any) -> None:
    folder, flags = again(name)
    before = contents(folder)

    def interrupted() -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.25)

    status, text = in_child(STAGES[name].command, flags, folder, interrupted)
    if status == 0:
        pytest.skip("the job was done before")
    assert status == 130, text
    anew = "the same command starts from the beginning"
    remedy = anew if name == "preprocess" else "run the same command again to go on"
    assert one_sentence(text).endswith(f"interrupted; {remedy}")
    after = contents(folder)
    done = b'"seed": 5' in after.get("out/i.json", b"")  # all but the end of the process
    whole = {"out/i", "out/i.json"} if done else set()
    assert changed(before, after) <= {*TRAINED, "out/checkpoint_last.pt", *whole}


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("", "the same command starts from the beginning"),
        ("--save-scores OUT/s", "the same command starts from the beginning"),
        ("--save-scores OUT/s --save-searches --knnlm", "run the same command again to go on"),
        ("--save-knnlm-dstore --dstore-mmap OUT/d", "run the same command again to go on"),
    ],
)
def test_control_c_of_an_evaluation(
    flags: str, remedy: str, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said about a second run is true."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_cli.eval_lm.LMScoring", interrupted)
    words = ["data-bin", "--path", "checkpoints/checkpoint_best.pt", *flags.replace("OUT", str(tmp_path)).split()]
    done = run_cli("eval_lm", words, cwd=GOLDEN)
    assert (done.status, done.stderr.splitlines()[-1]) == (130, f"eval_lm.py: error: interrupted; {remedy}")


class Final:
    """Ctrl-C comes while it is finalised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("place", [ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT)), Final])
def test_control_c_where_python_ignores_it(
    place: Callable[[], object], run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what C code calls back, and in a finaliser: the command ends right after it."""
    went_on = []

    def work(args: Any) -> None:
        place()
        went_on.append(len("so"))

    monkeypatch.setattr("fairseq_cli.kmeans.main", work)
    hook = sys.unraisablehook
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        done = run_cli("kmeans", "--dstore d --num-clusters 1 --sample 1".split())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, went_on) == (130, [])
    assert one_sentence(done.stderr).startswith("kmeans.py: error: interrupted")
    assert sys.unraisablehook is hook


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(UserError, match="r.json: found a folder"):
        write_json(tmp_path / "r.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_plan_larger_than_memory(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "available_memory", lambda: 1000)
    flags = f"--dstore_mmap {GOLDEN}/checkpoints/dstore16 --dstore_size 16938 --dimension 32 --dstore_fp16"
    flags += f" --ncentroids 8 --code_size 2 --faiss_index {tmp_path}/i --no-progress-bar"
    error = run_cli("build_dstore", flags.split()).error
    assert "building the index needs about 2.34 MB of memory, and 1 kB are free" in error
    assert not list(tmp_path.iterdir())
    flags += f" --force --results-json {tmp_path}/r.json"
    done = run_cli("build_dstore", flags.split())
    assert done.status == 0, done.stderr
    (sentence,) = json.loads((tmp_path / "r.json").read_text())["forced"]
    assert "building the index needs" in sentence


def test_force_ends_with_its_command(tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    test_a_plan_larger_than_memory(tmp_path, run_cli, monkeypatch)
    flags = f"--dstore_mmap {GOLDEN}/checkpoints/dstore16 --dstore_size 16938 --dimension 32 --dstore_fp16"
    run_cli("build_dstore", f"{flags} --ncentroids 8 --code_size 2 --faiss_index {tmp_path}/j".split())
    assert not (tmp_path / "j").exists()


def test_memory_of_this_machine() -> None:
    available = refusals.available_memory()
    assert available is None or 1 << 20 < available < 1 << 50
