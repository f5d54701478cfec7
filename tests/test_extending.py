"""The strategy in docs/extending.md, run as written: through the command line as a plug-in, and within forty lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


@pytest.fixture(scope="module")
def plug_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 40
    package = tmp_path_factory.mktemp("user") / "my_ideas"
    package.mkdir()
    (package / "__init__.py").write_text(code[1])
    return package


def evaluate(tmp_path: Path, *flags: str) -> dict[str, float]:
    words = (
        "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 "
        "--context-window 96 --batch-size 2 --gen-subset valid --no-progress-bar "
        "--dstore-filename checkpoints/dstore16 --indexfile checkpoints/knn16.index --knnlm --dstore-fp16 "
        "--k 256 --probe 8 --lmbda 0.25 "
        "--knn-sim-func do_not_recomp_l2 --no-load-keys"
    ).split()
    results = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "eval_lm.py"), *words, *flags, "--results-json", str(results)]
    run = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(results.read_text())


def test_the_documented_strategy_runs_as_a_plug_in(plug_in: Path, tmp_path: Path) -> None:
    every_fourth = evaluate(tmp_path, "--user-dir", str(plug_in), "--strategy", "periodic", "--search-every", "4")
    # at least every fourth token is searched, so at most three quarters of the searches are saved
    assert 0 < every_fourth["searches_saved_percent"] <= 75
    always = evaluate(
        tmp_path, "--user-dir", str(plug_in), "--strategy", "periodic", "--search-every", "1", "--min-knns", "9999999"
    )
    assert always["searches_saved_percent"] == 0
    plain = evaluate(tmp_path, "--min-knns", "9999999")
    assert always["loss_base2"] == pytest.approx(plain["loss_base2"], abs=1e-9)  # no token is idle, so nothing decays


def test_an_unknown_strategy_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval_lm.py"), "data-bin", "--path", "x", "--strategy", "periodic"]
    run = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert run.returncode == 2
    assert "periodic" in run.stderr and "Traceback" not in run.stderr
