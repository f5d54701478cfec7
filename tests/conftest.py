"""Fixtures of all tests: one thread (so that numbers do not depend on the machine), the golden bundle, and two ways to
run a command: inside this process (fast; exit status and streams are captured), and by the scripts in the repository's
root as a user would (slow to start, so only few tests do)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or faiss

import contextlib
import importlib
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"

torch.set_num_threads(1)
# The same examples on every run: a test that fails does so for everybody.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switch for tests that need minutes or gigabytes."""
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow too (or set RUN_SLOW=1)")


def pytest_configure(config: pytest.Config) -> None:
    """Drops the project's default of leaving slow tests out, when asked to."""
    asked = config.getoption("--run-slow") or os.environ.get("RUN_SLOW") == "1"
    if asked and config.option.markexpr == "not slow":
        config.option.markexpr = ""


@dataclass
class Finished:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one sentence of a failed command: status 2, no traceback, and nothing but log lines beside it."""
        assert self.status == 2, f"status {self.status}\n{self.stderr}"
        assert "Traceback" not in self.stderr
        lines = [line for line in self.stderr.splitlines() if " | INFO | " not in line and " | WARNING | " not in line]
        sentences = [line for line in lines if ": error: " in line]
        assert len(sentences) == 1, self.stderr
        assert lines[-1] == sentences[0], self.stderr
        return sentences[0]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden bundle (its README says what it is). Only read from it: tests write to tmp_path."""
    return GOLDEN


@pytest.fixture(scope="session")
def encoder_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of small encoders (see `tests/encoder_files.py`)."""
    from tests.encoder_files import learn_encoders

    folder = tmp_path_factory.mktemp("encoders")
    learn_encoders(folder)
    return folder


@contextlib.contextmanager
def _process_state(argv: list[str], cwd: str | os.PathLike[str]) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """argv, folder, streams and log handlers of a command run inside this process."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    for handler in handlers:  # the command configures logging afresh, which closes what it finds
        logger.removeHandler(handler)
    saved = sys.argv
    sys.argv = argv
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        sys.argv = saved
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level)


def run_inside(command: str, arguments: Sequence[object], cwd: str | os.PathLike[str] = ".") -> Finished:
    """Runs `fairseq_cli.<command>.cli_main` in this process."""
    argv = [command + ".py", *map(str, arguments)]
    status: object = 0
    with _process_state(argv, cwd) as (out, err):
        try:
            importlib.import_module("fairseq_cli." + command).cli_main()
        except SystemExit as stop:
            status = stop.code or 0
    return Finished(status if isinstance(status, int) else 1, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Finished]:
    """run_cli("eval_lm", [arguments], cwd=folder): a command inside this process."""
    return run_inside


@pytest.fixture(scope="session")
def run_door() -> Callable[..., Finished]:
    """run_door("eval_lm.py", [arguments], cwd=folder): a command as its own process, from the repository's root."""

    def run(door: str, arguments: Sequence[object], cwd: str | os.PathLike[str] = ".") -> Finished:
        command = [sys.executable, str(ROOT / door), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module", params=["compiled", "arrays"])
def compiled_and_arrays(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module's tests run with the compiled loops, where they can be had, and with array code."""
    from fairseq.retrieval import kernels

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "arrays":
            patch.setattr(kernels, "AVAILABLE", False)
        elif not kernels.AVAILABLE:
            pytest.skip("numba is not installed")
        yield
