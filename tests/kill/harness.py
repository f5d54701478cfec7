"""Kills long jobs at random instants and starts them again: the result must be that of a job without interruption.

A job runs as a child process of its own, which gets SIGKILL, like a machine that loses power but for the disk's cache.
`python -m tests.kill.harness 25 [STAGE...]` prints a table: stage, kills, how many ended identical."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.kill.stages import NEEDS, STAGES, Stage, run_command


@dataclass
class Report:
    """kills: jobs that were killed before they were done; identical: killed and continued runs with the right result;
    different: what came out otherwise; slowest: seconds of the longest continuation, against `alone` uninterrupted."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    alone: float = 0.0
    slowest: float = 0.0
    different: list[str] = field(default_factory=list)


def torment(name: str, kills: int, seed: int = 1) -> Report:
    """Runs a stage, killed once or several times in a row, until `kills` kills have hit."""
    for module in ("torch.distributed.tensor", "faiss", "fairseq_cli." + STAGES[name].command):
        importlib.import_module(module)  # once, and not in every child
    if name in NEEDS:
        importlib.import_module(NEEDS[name]).PreTrainedTokenizerFast  # noqa: B018  (which loads what is loaded lazily)
    stage, report, generator = STAGES[name], Report(), random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary, "inputs")
        inputs.mkdir()
        _run(_prepare, stage, inputs)
        alone = _fresh(inputs, Path(temporary, "job"))  # the same path each time, as some results name it
        report.alone = _finish(stage, alone)
        expected = stage.digest(alone)
        while report.kills < kills:
            folder = _fresh(inputs, Path(temporary, "job"))
            hits = 0
            for _ in range(generator.choice((1, 1, 2, 3))):
                hits += _kill(stage, folder, generator.uniform(0.02, 1.0) * report.alone)
            report.kills += hits
            report.slowest = max(report.slowest, _finish(stage, folder))
            _compare(report, expected, stage.digest(folder))
    return report


def _compare(report: Report, expected: dict[str, Any], found: dict[str, Any]) -> None:
    report.runs += 1
    if found == expected:
        report.identical += 1
    else:
        wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        report.different.append(", ".join(wrong))


def _fresh(inputs: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder)
    return folder


def _prepare(stage: Stage, folder: Path) -> None:
    stage.prepare(folder)


def _work(stage: Stage, folder: Path) -> None:
    run_command(stage.command, stage.flags, folder)


def _quiet(target: Any, stage: Stage, folder: Path) -> None:
    """The child: silent unless it fails, in a process group of its own."""
    os.setsid()
    log = os.open(str(folder / "child.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    tqdm.set_lock(threading.RLock())  # its own is shared with other processes, and lost with a child that held it
    target(stage, folder)


def _start(target: Any, stage: Stage, folder: Path) -> Any:
    child = multiprocessing.get_context("fork").Process(target=_quiet, args=(target, stage, folder))
    child.start()
    return child


def _run(target: Any, stage: Stage, folder: Path) -> None:
    child = _start(target, stage, folder)
    child.join()
    if child.exitcode:
        raise RuntimeError(f"status {child.exitcode}: {(folder / 'child.log').read_text()[-3000:]}")
    (folder / "child.log").unlink()


def _finish(stage: Stage, folder: Path) -> float:
    """Runs the job to its end; seconds. It may have been killed when all was done but the process had not ended yet:
    then some commands say so and refuse to begin again, and the result is compared all the same."""
    began = time.perf_counter()
    try:
        _run(_work, stage, folder)
    except RuntimeError as error:
        if stage.refuses is None or stage.refuses not in str(error):
            raise
        (folder / "child.log").unlink()
    return time.perf_counter() - began


def _kill(stage: Stage, folder: Path, seconds: float) -> int:
    """Starts the job and kills it after `seconds`; 0 when it was done before that. Its workers are left to notice."""
    child = _start(_work, stage, folder)
    child.join(seconds)
    if child.exitcode is not None:
        return 0
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return 1


if __name__ == "__main__":
    for chosen in sys.argv[2:] or list(STAGES):
        outcome = torment(chosen, int(sys.argv[1]))
        print(
            f"{chosen:16} {outcome.kills:3} kills  {outcome.identical} of {outcome.runs} identical  "
            f"alone {outcome.alone:.1f} s, longest continuation {outcome.slowest:.1f} s  {outcome.different}",
            flush=True,
        )
