"""Models of the published sizes, without the downloads: a random checkpoint of the real WikiText-103 shape (V 267,744,
16 layers, width 1024) and one of the WMT19-en shape (width 1536, in and out 1024, 20 layers), in the layouts of both
fairseq generations, each loaded by `eval_lm.py` in a process of its own that evaluates 2,000 tokens, and by a second
that saves a slice of a datastore. Needs 6 GB of disk and of memory, and minutes: `pytest --run-slow tests/full_size`.

Times and peak memory go to the file that FULL_SIZE_RESULTS names (else to the test's folder)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDER = Path(__file__).with_name("random_checkpoint.py")
_spec = importlib.util.spec_from_file_location("random_checkpoint", BUILDER)
assert _spec is not None and _spec.loader is not None
random_checkpoint = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_checkpoint)

ALLOWANCE = 2_000_000_000  # bytes above the weights' own
FLAGS = {  # as in the published commands
    "wiki103": ["--context-window", "1536", "--max-tokens", "3072"],
    "wmt19": ["--max-tokens", "2048", "--remove-bpe"],
}
BREAK_MODES = {"wiki103": ("complete", "none"), "wmt19": ("eos", "eos")}
EXPECTED_ROWS = {"wiki103": 3600 - 1536, "wmt19": 3600}


def run_door(arguments: list[str], folder: Path) -> str:
    """Runs `eval_lm.py` as its own process; returns its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, str(ROOT / "eval_lm.py"), str(folder / "data-bin"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def measured(shape: str, folder: Path, action: str, flags: list[str]) -> tuple[dict[str, Any], str]:
    """One run: the figures of its results file with wall-clock seconds, and its log."""
    results = folder / f"{action}.json"
    started = time.perf_counter()
    common = ["--path", str(folder / "checkpoint.pt"), "--cpu", "--no-progress-bar", "--results-json", str(results)]
    log = run_door([*common, *FLAGS[shape], *flags], folder)
    figures = json.loads(results.read_text())
    return {**figures, "wall_seconds": time.perf_counter() - started}, log


def measure(shape: str, layout: str, folder: Path) -> dict[str, Any]:
    """Builds, evaluates, saves, checks; returns what is reported. The folder's large files are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([sys.executable, str(BUILDER), shape, layout, str(folder)], check=True, timeout=1200)
        file_bytes = (folder / "checkpoint.pt").stat().st_size
        modes = BREAK_MODES[shape]
        flags = ["--gen-subset", "valid", "--sample-break-mode", modes[0]]
        evaluation, log = measured(shape, folder, "evaluate", flags)
        parameters = random_checkpoint.SHAPES[shape]["parameters"]
        assert f"num. model params: {parameters}" in log
        assert evaluation["num_tokens"] == 2000
        assert np.isfinite(evaluation["loss_base2"])

        store = folder / "store16"
        flags = ["--gen-subset", "train", "--sample-break-mode", modes[1], "--save-knnlm-dstore", "--dstore-fp16"]
        saving, _ = measured(shape, folder, "save", [*flags, "--dstore-mmap", str(store)])
        rows, width = EXPECTED_ROWS[shape], random_checkpoint.SHAPES[shape]["width"]
        keys = np.memmap(f"{store}_keys.npy", np.float16, "r", shape=(rows, width))
        assert os.path.getsize(f"{store}_keys.npy") == keys.nbytes
        assert os.path.getsize(f"{store}_vals.npy") == rows * 8
        assert np.isfinite(np.asarray(keys, np.float32)).all() and keys.any(axis=1).all()
        return {
            "parameters": parameters,
            "weight_bytes": parameters * 4,
            "checkpoint_bytes": file_bytes,
            "loss_base2": evaluation["loss_base2"],
            "key_sum": float(np.asarray(keys, np.float64).sum()),
            **{
                f"{action}_{name}": figures[name]
                for action, figures in (("evaluate", evaluation), ("save", saving))
                for name in ("wall_seconds", "peak_memory_bytes")
            },
        }
    finally:
        for large in folder.glob("*.pt"):
            large.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["wiki103", "wmt19"])
def test_both_generations(shape: str, tmp_path: Path) -> None:
    found = {layout: measure(shape, layout, tmp_path / layout) for layout in ("args", "cfg")}
    path = Path(os.environ.get("FULL_SIZE_RESULTS", tmp_path / "full_size.json"))
    report = json.loads(path.read_text()) if path.exists() else {}
    report[shape] = found
    path.write_text(json.dumps(report, indent=1))
    for layout, figures in found.items():
        print(shape, layout, json.dumps(figures))
    for figures in found.values():
        limit = figures["weight_bytes"] + ALLOWANCE
        assert figures["evaluate_peak_memory_bytes"] <= limit
        assert figures["save_peak_memory_bytes"] <= limit
    older, newer = found["args"], found["cfg"]
    assert older["loss_base2"] == pytest.approx(newer["loss_base2"], abs=1e-6)
    assert older["key_sum"] == pytest.approx(newer["key_sum"], abs=1e-3)
