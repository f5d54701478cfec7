"""The commands of the README, run as they are printed, on a little text, with the numbers of SHRINK where they would
take minutes; the WikiText-103 commands, which take days, are only parsed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq import options
from fairseq_cli import build_dstore, kmeans

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What the commands say, and what the test types instead. Each must be found in it.
SHRINK = {
    "prepare_sotu.py sotu/text": "prepare_sotu.py sotu/text --text texts",
    "--warmup-updates 100": "--warmup-updates 2",
    "--max-update 3000": "--max-update 8",
    "--ncentroids 256 --code_size 32": "--ncentroids 8 --code_size 4",
    "--num-clusters 7000 --sample 150000": "--num-clusters 20 --sample 900",
    "clusters_s150000_k7000_members": "clusters_s900_k20_members",
    "--k 512": "--k 32",
}


def commands(heading: str) -> list[str]:
    """The shell commands in the fenced blocks of the section with this heading, continuation lines joined."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert section, f"README.md has no section {heading!r}"
    blocks = re.findall(r"^```bash\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a clone and holds a few small texts, each with words of its own and common ones."""
    for name in ("preprocess.py", "train.py", "eval_lm.py", "build_dstore.py", "kmeans.py", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    for year in range(6):
        words = [f"we w{i * i % (37 + year)} the state , of w{i % 11} union ." for i in range(60)]
        (tmp_path / "texts" / f"{2000 + year}.txt").write_text("\n\n".join(words))
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def shrunk(script: str, *needed: str) -> str:
    for typed, small in SHRINK.items():
        assert typed in script or typed not in needed, f"the README no longer says {typed!r}: update SHRINK"
        script = script.replace(typed, small)
    return script


def test_the_commands_and_the_python_at_the_top_run_as_typed(checkout: Path) -> None:
    script = shrunk("\n".join(commands("2. The same by hand")), *SHRINK)
    done = run(["bash", "-euo", "pipefail", "-c", script], checkout)
    assert done.stderr.count("Perplexity:") == 3 and done.stderr.count("Lookups saved:") == 2
    results = json.loads((checkout / "sotu" / "retomaton.json").read_text())
    assert 1 < results["perplexity"] < 1000 and 0 < results["searches_saved_percent"] < 100
    (quickstart,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = run([sys.executable, "-c", shrunk(quickstart).replace("k=512", "k=32")], checkout).stdout.splitlines()
    assert len(lines) == 5
    assert all(float(number) > 0 for number in lines[0].split())
    assert all(" -> " in line for line in lines[1:4]) and lines[4].startswith("we ")


def test_the_wikitext_commands_are_accepted_by_their_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = {
        "eval_lm.py": options.get_eval_lm_parser,
        "build_dstore.py": build_dstore.get_parser,
        "kmeans.py": kmeans.get_parser,
    }
    typed = [shlex.split(line) for line in commands("3. WikiText-103")]
    assert {words[1] for words in typed} == set(parsers)
    for _, program, *words in typed:
        monkeypatch.setattr(sys, "argv", [program, *words])
        parser = parsers[program]()
        if program == "eval_lm.py":
            args = options.parse_args_and_arch(parser, words)
            assert args.data == "data-bin/wikitext-103"
        else:
            parser.parse_args(words)


def test_the_flag_table_names_flags_that_exist() -> None:
    table = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `--")]
    flags = {flag for cell in table for flag in re.findall(r"--[a-z-]+", cell)}
    assert "--min-knns" in flags and "--members" in flags
    parser = options.get_eval_lm_parser()
    words = ["data", "--path", "x", "--strategy", "random_skip"]
    known = vars(options.parse_args_and_arch(parser, words))
    assert {flag for flag in flags if flag[2:].replace("-", "_") not in known} == set()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert local and [target for target in local if not (ROOT / target).exists()] == []
