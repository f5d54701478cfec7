"""The commands of docs/own_text.md, run as they are printed, one after the other, on a little wrapped text, with
smaller numbers where they would take minutes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.encoder_files import syllable_text

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_text.md").read_text(encoding="utf-8")
# What the page says, and what the test types instead. Each must be found in it.
SHRINK = {
    "vocab_size=8000": "vocab_size=110",
    "--warmup-updates 100": "--warmup-updates 2",
    "--max-update 3000": "--max-update 8",
    "--ncentroids 256 --code_size 32": "--ncentroids 8 --code_size 4",
    "--sample 150000": "--sample 900",
    "clusters_s150000": "clusters_s900",
    "--k 512": "--k 32",
}


def test_the_commands_of_the_page_run_as_typed(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    for name in ("preprocess.py", "train.py", "eval_lm.py", "build_dstore.py", "kmeans.py", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    rng = random.Random(3)
    lines = syllable_text()
    paragraphs = [" ".join(rng.choices(lines, k=rng.randint(2, 5))) + "." for _ in range(60)]
    book = "\n\n".join(textwrap.fill(paragraph, 72) for paragraph in paragraphs)
    (tmp_path / "texts" / "book.txt").write_text(book, encoding="utf-8")
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    for typed, small in SHRINK.items():
        assert typed in script, f"the page no longer says {typed!r}: update SHRINK"
        script = script.replace(typed, small)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lines wrapped at a width" in done.stderr + done.stdout
    assert (tmp_path / "own" / "text" / "train.txt").read_text().count("\n") < 60  # joined, one line a paragraph
    assert "counted per word" in done.stderr and done.stderr.count("Perplexity:") == 2
    assert (tmp_path / "own" / "sweep.md").exists()
