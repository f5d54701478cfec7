"""Every flag, command and file that README, CHANGELOG and docs mention exists."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from fairseq import options
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli.doctor import get_verify_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_PROGRAMS = {"--editable", "--model", "--model_args", "--tasks", "--batch_size"}  # pip, lm-evaluation-harness
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def flags_of_commands() -> set[str]:
    """The flags of all commands, with those of every class that can be chosen."""
    parsers = [options.get_preprocessing_parser(), options.get_training_parser(), options.get_eval_lm_parser()]
    parsers.append(options.get_interactive_parser())
    parsers += [
        importlib.import_module(f"fairseq_cli.{name}").get_parser()
        for name in ("build_dstore", "kmeans", "greedy_merge", "adaptret", "sweep")
    ]
    parsers.append(get_verify_parser())
    classes = [*ARCH_MODEL_REGISTRY.values(), *TASK_REGISTRY.values(), *RETRIEVER_REGISTRY.values()]
    classes += [cls for registry in REGISTRIES.values() for cls in registry.classes.values()]
    for cls in classes:
        if hasattr(cls, "add_args"):
            parsers.append(argparse.ArgumentParser(conflict_handler="resolve"))
            cls.add_args(parsers[-1])
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


def flags_of_scripts() -> set[str]:
    """What the scripts of examples, benchmarks and tests read."""
    files = [path for folder in ("examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")]
    scripts = [path for path in files if path.suffix in (".py", ".sh") and path != Path(__file__)]
    declared = re.compile(r"add(?:_argument)?\(\s*\"--[a-z-]+\"|^\s*--[a-z-]+(?: *\| *--[a-z-]+)*\)", re.MULTILINE)
    parts = [part for path in scripts for part in declared.findall(path.read_text("utf-8"))]
    return set(FLAG.findall(" ".join(parts)))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    declared_here = set(re.findall(r"add_argument\(\"(--[a-z-]+)\"", text))  # in an example
    known = flags_of_commands() | flags_of_scripts() | OF_OTHER_PROGRAMS | declared_here
    assert sorted(set(FLAG.findall(text)) - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_exist(page: Path) -> None:
    scripts = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
    assert set(re.findall(r"\bfairseq-(?:[a-z]+-)*[a-z]+\b", page.read_text(encoding="utf-8"))) <= scripts


def test_the_readme_has_each_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    rows = re.findall(r"^\| `(fairseq-[a-z-]+)` \| (?:`(\w+)\.py` )?\|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(scripts)
    assert {script for _, script in rows if script} == {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert all(scripts[name] == f"fairseq_cli.{script}:cli_main" for name, script in rows if script)
