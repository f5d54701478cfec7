"""Many interrupts at once, and no memory: one sentence, the promised status, no traceback."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.errors import UserError
from fairseq.files.array_files import read_digested, write_digested
from fairseq.retrieval.index import FaissIndex
from fairseq_cli import entry
from tests.kill.stages import STAGES
from tests.test_no_half_files import in_child, one_sentence


def burst(after: float) -> Callable[[], None]:
    """Sends this process fifty interrupts in a tenth of a second."""

    def begin() -> None:
        entry.is_program = lambda: True

        def send() -> None:
            time.sleep(after)
            for _ in range(50):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.002)

        threading.Thread(target=send, daemon=True).start()

    return begin


@pytest.mark.parametrize("name", ["preprocess", "save datastore", "build index", "two-level k-means"])
@pytest.mark.parametrize("after", [0.1, 0.4])
def test_many_interrupts(name: str, after: float, tmp_path: Path) -> None:
    STAGES[name].prepare(tmp_path)
    status, text = in_child(STAGES[name].command, STAGES[name].flags, tmp_path, burst(after))
    assert "Traceback" not in text and "Exception ignored" not in text, text
    if status:
        assert status == 130 and "interrupted; " in one_sentence(text)
    assert not list(tmp_path.rglob("*.lock"))


NO_MEMORY: dict[str, Callable[[], object]] = {
    "python": lambda: bytearray(1 << 62),
    "torch": lambda: torch.empty(1 << 60),
    "threads": lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
    "faiss": lambda: (_ for _ in ()).throw(RuntimeError("std::bad_alloc")),
}


@pytest.mark.parametrize("what", NO_MEMORY)
def test_no_memory(what: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        entry.cli_entry(NO_MEMORY[what])
    assert ended.value.code == 2
    assert "does not suffice; raise the limit" in one_sentence(capfd.readouterr().err)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="size"):
        entry.cli_entry(lambda: torch.ones(2) @ torch.ones(3) if not (_ := 0) else None)


def test_a_limit_on_memory(tmp_path: Path) -> None:
    """`ulimit -v`, with a little more than what the process has when the work begins."""
    STAGES["k-means"].prepare(tmp_path)

    def limited() -> None:
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 20), now + (1 << 20)))

    status, text = in_child("kmeans", STAGES["k-means"].flags, tmp_path, limited)
    assert status in (0, 2), text
    if status:
        assert "does not suffice" in one_sentence(text)


def faiss_index(path: str, size: int) -> None:
    FaissIndex(path, size)


def array(path: str, size: int) -> None:
    read_digested(path)


BIG = 1 << 20
LARGE_FILES: dict[str, tuple[Callable[[str], object], Callable[[str, int], None]]] = {
    "faiss": (lambda path: faiss.write_index(index_of(np.zeros((BIG, 16), np.float32)), path), faiss_index),
    "sealed arrays": (lambda path: write_digested(path, {}, {"a": np.zeros(16 * BIG, np.float32)}), array),
}


def index_of(keys: np.ndarray) -> Any:
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return index


@pytest.mark.parametrize("kind", LARGE_FILES)
def test_a_good_file_that_does_not_fit_is_not_called_damaged(kind: str, tmp_path: Path) -> None:
    """`ulimit -v` while a file of 64 MB is opened; in a process of its own, which has the limit."""
    write, read = LARGE_FILES[kind]
    write(str(tmp_path / "file"))

    def limited() -> None:
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (8 << 20), now + (8 << 20)))
        try:
            read(str(tmp_path / "file"), BIG)
        except UserError as error:
            os._exit(0 if "file: using it needs more memory" in str(error) and "ulimit -v" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)

    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_interrupts_while_libraries_are_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairseq_cli.kmeans", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        while process.poll() is None and b"torch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            time.sleep(0.005)
        for _ in range(5):
            process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode in (0, 130) and b"Traceback" not in said, said
