"""Two processes with the same output: the second is refused, and the first one's process id and host are named; the
lock of a killed process has no effect. The first process stops when it opens its first temporary file, so that it is
certainly in the middle of its work."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fairseq.errors import UserError
from fairseq.files import output_lock
from fairseq.files.output_lock import OutputInUse, exclusive, lock_path
from tests.kill.stages import MODEL, NEIGHBOURS, STAGES, Stage, file_digests
from tests.test_no_half_files import in_child, one_sentence

JSON = Stage("eval_lm", f"{MODEL} --gen-subset valid --results-json out/r.json", lambda folder: None, file_digests())
MORE = {
    "saved scores": dataclasses.replace(JSON, flags=f"{MODEL} --gen-subset valid --save-scores out/s"),
    "saved searches": dataclasses.replace(
        JSON, flags=f"{MODEL} --gen-subset valid --save-scores out/s --save-searches {NEIGHBOURS}"
    ),
    "results": JSON,
    "log": dataclasses.replace(JSON, flags=f"{JSON.flags} --results-path out"),
}
ALL = {**STAGES, **MORE}


class Stopped:
    """A child process that runs a stage and stops at its first temporary file, until it is let go."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        came, self._go = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                sys.addaudithook(self._hook(came[1]))
                in_process(stage, folder)
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            finally:
                os._exit(status)
        os.close(came[1])
        os.close(self._go[0])
        assert os.read(came[0], 1) == b"x", (folder / "first.log").read_text()
        os.close(came[0])

    def _hook(self, came: int) -> Callable[[str, tuple[Any, ...]], None]:
        stopped: list[bool] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith(".tmp") and not stopped:
                stopped.append(True)
                os.write(came, b"x")
                os.read(self._go[0], 1)

        return hook

    def go_on(self) -> int:
        """Lets it go; its exit status."""
        os.write(self._go[1], b"x")
        return self.wait()

    def wait(self) -> int:
        """Its exit status, minus the signal's number when one killed it."""
        os.close(self._go[1])
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def in_process(stage: Stage, folder: Path) -> None:
    from tests.kill.stages import run_command

    log = os.open(folder / "first.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    run_command(stage.command, stage.flags, folder)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".lock", ".tmp"))]


@pytest.mark.parametrize("name", ALL)
def test_the_second_is_refused(name: str, tmp_path: Path) -> None:
    stage = ALL[name]
    stage.prepare(tmp_path)
    first = Stopped(stage, tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    status, text = in_child(stage.command, stage.flags, tmp_path, lambda: None)
    assert status == 2, text
    sentence = one_sentence(text)
    assert f"process {first.pid} on host {socket.gethostname()} is writing it" in sentence
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    assert first.go_on() == 0, (tmp_path / "first.log").read_text()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["preprocess", "build index", "k-means", "saved scores"])
def test_a_killed_one_blocks_nobody(name: str, tmp_path: Path) -> None:
    stage = ALL[name]
    stage.prepare(tmp_path)
    first = Stopped(stage, tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert [name for name in leftovers(tmp_path) if name.endswith(".lock")]
    status, text = in_child(stage.command, stage.flags, tmp_path, lambda: None)
    assert status == 0, text
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The lock itself


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """An output that another process holds."""
    ready, done = os.pipe(), os.pipe()
    (tmp_path / "real").mkdir()
    output = tmp_path / "real" / "out"
    pid = os.fork()
    if pid == 0:
        os.close(done[1])
        with exclusive(output):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    yield output
    os.close(done[1])
    os.waitpid(pid, 0)


def test_by_other_paths(held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(held.parent)
    monkeypatch.chdir(tmp_path)
    for path in ("real/out", "link/out", "./real/../link/out", str(held)):
        with pytest.raises(OutputInUse, match="process [0-9]+ on host"), exclusive(path):
            pass
    with exclusive(tmp_path / "real" / "other"):
        pass


def test_nested_and_released(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with exclusive(output), exclusive(output):
        assert lock_path(output).read_text().startswith(f"process {os.getpid()} on host ")
        assert output_lock.holds_lock_for(tmp_path / "folder" / "x")
        said: list[str] = []

        def other() -> None:
            try:
                with exclusive(output):
                    pass
            except OutputInUse as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "another thread of this process is writing it" in said[0]
    assert not list(tmp_path.iterdir()) and not output_lock.holds_lock_for(output)


def test_a_child_holds_nothing(tmp_path: Path) -> None:
    """A worker that outlives a killed parent does not keep its output locked."""
    output, ready, done = tmp_path / "out", os.pipe(), os.pipe()
    parent = os.fork()
    if parent == 0:
        with exclusive(output):
            if os.fork() == 0:
                os.close(done[1])
                os.write(ready[1], b"x")
                os.read(done[0], 1)  # until the test ends
                os._exit(0)
            signal.pause()
    os.read(ready[0], 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with exclusive(output):
        pass
    assert not list(tmp_path.iterdir())
    os.close(done[1])


@pytest.mark.parametrize("kind", ["text", "link", "pipe", "folder"])
def test_what_is_no_lock_stays(kind: str, tmp_path: Path) -> None:
    path = lock_path(tmp_path / "out")
    make: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("the user's"),
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    make[kind]()
    with pytest.raises(UserError, match="out.lock"), exclusive(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out.lock"]


@pytest.mark.parametrize("option", sorted(output_lock.LOCAL_OPTIONS))
def test_a_mount_without_locks_for_others_is_said(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        f"36 22 0:32 / {tmp_path} rw,relatime shared:1 - nfs4 server:/export rw,{option},vers=4.2\n"
    )
    monkeypatch.setattr(output_lock, "MOUNTS", str(mounts))
    with exclusive(tmp_path / "out"):
        assert f"mounted with {option}, so other machines do not see locks" in caplog.text


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with exclusive(tmp_path / "out"):
        assert "gives no locks (No locks available)" in caplog.text


