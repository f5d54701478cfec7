"""Benchmarks are commands too: a missing file or flag is one sentence and status 2."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CASES = {
    "build_index.py --dstore lost": "lost_vals.npy: no such file",
    "evaluation.py": "the following arguments are required: data",
    "evaluation.py data-bin": "--dstore-filename: found nothing",
    "evaluation.py data-bin --dstore-filename checkpoints/dstore16": "--indexfile: found nothing",
    "evaluation.py data-bin --dstore-filename checkpoints/dstore16 --indexfile lost": "lost: found a file that FAISS",
    "exact.py --dstore lost": "lost_vals.npy: no such file",
    "kmeans.py --dstore lost": "lost_vals.npy: no such file",
    "language_model.py data-bin --path lost": "lost: no such file",
    "memory.py": "the following arguments are required: data",
    "preprocess.py --text lost": "lost: No such file",
    "scale.py": "--folder",
    "search.py --dstore lost --index a=checkpoints/knn16.index": "lost_vals.npy: no such file",
    "search.py --dstore checkpoints/dstore16 --index a": "--index: found 'a', expected NAME=FILE",
    "search.py --dstore checkpoints/dstore16 --index a=lost": "--index: found 'a=lost', expected NAME=FILE",
    "training.py data-bin": "--task",
}


def _run(script: str, words: list[str], folder: Path, log: Path) -> None:
    """The child: the script as a command, in `folder`."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = [script, *words]
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


@pytest.mark.parametrize("line", CASES)
def test_mistakes_are_one_sentence(line: str, golden: Path, tmp_path: Path) -> None:
    script, *words = line.split()
    log = tmp_path / "log"
    child = multiprocessing.get_context("fork").Process(target=_run, args=(script, words, golden, log))
    child.start()
    child.join(60)
    text = log.read_text()
    assert child.exitcode == 2, text
    assert "Traceback" not in text
    assert f"{script}: error: " in text.splitlines()[-1] and CASES[line] in text.splitlines()[-1]
