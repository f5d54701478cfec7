"""The demo script itself, with a stand-in for `python` that only notes its arguments: order, skipping, settings."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "retomaton" / "demo.sh"


STAND_IN = """#!/bin/sh
printf '%s\\t' "$@" >>{folder}/calls.txt
echo >>{folder}/calls.txt
mkdir -p {folder}/run/data-bin {folder}/run/dstore
seq 800 >{folder}/run/data-bin/dict.txt
head -c 80000 /dev/zero >{folder}/run/dstore/dstore16_vals.npy
[ "$1" != "$FAIL" ]
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a `python` that notes its arguments in calls.txt, leaves a dictionary of 800 words and a datastore
    of 10,000 entries, and fails when told to."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN.format(folder=tmp_path))
    python.chmod(0o755)
    return tmp_path


def demo(folder: Path, *words: str, fail: str = "") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    calls = folder / "calls.txt"
    calls.write_text("")
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "VENV": "/none", "FAIL": fail}
    command = ["bash", str(SCRIPT), "--out", str(folder / "run"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]


def test_the_five_commands_run_in_order_and_are_shown_as_typed(stand_in: Path) -> None:
    done, calls = demo(stand_in, "--short")
    assert done.returncode == 0, done.stderr
    programs = [call[0] for call in calls]
    first = ["examples/retomaton/prepare_sotu.py", "preprocess.py", "train.py", "eval_lm.py"]
    assert programs[:6] == [*first, "build_dstore.py", "kmeans.py"]
    assert set(programs[6:-1]) == {"eval_lm.py"} and programs[-1] == "examples/retomaton/report.py"
    assert calls[2][calls[2].index("--adaptive-input-cutoff") + 1] == "100,400"
    assert calls[5][calls[5].index("--num-clusters") + 1] == "100"
    shown = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert shown == [["python", *call] for call in calls]


def test_a_finished_stage_is_not_run_again(stand_in: Path) -> None:
    failed, before = demo(stand_in, "--short", fail="kmeans.py")
    assert failed.returncode != 0 and before[-1][0] == "kmeans.py"
    resumed, after = demo(stand_in, "--short")
    assert resumed.returncode == 0 and after[0] == before[-1]
    _, again = demo(stand_in, "--short")
    assert [call[0] for call in again] == ["examples/retomaton/report.py"]


def test_a_folder_of_another_run_is_refused(stand_in: Path) -> None:
    assert demo(stand_in, "--short")[0].returncode == 0
    other, calls = demo(stand_in)
    assert other.returncode == 2 and "other settings" in other.stderr and calls == []


@pytest.mark.parametrize(("words", "flag"), [(["--fast"], "--fast"), (["--text", "/no/such/folder"], "--text")])
def test_a_wrong_flag_is_one_sentence(stand_in: Path, words: list[str], flag: str) -> None:
    done, calls = demo(stand_in, *words)
    assert done.returncode == 2 and flag in done.stderr and len(done.stderr.splitlines()) == 1 and calls == []
