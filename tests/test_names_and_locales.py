"""Names and locales: files whose names are no UTF-8, a locale that has another encoding, names that are empty. No text
is opened in the locale's encoding."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fairseq", "fairseq_cli", "examples", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
NAMES = {"another alphabet": "mod\u00e8le \u4e2d".encode(), "no UTF-8": b"mod\xe8le"}
LOCALES = {"UTF-8": {"LC_ALL": "C.UTF-8"}, "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}


def opens_in_locale(call: ast.Call) -> bool:
    """Whether a call opens text without saying in what encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:
        return False
    if name == "open" and isinstance(call.func, ast.Name):
        mode = call.args[1] if len(call.args) > 1 else keywords.get("mode", ast.Constant("r"))
        return isinstance(mode, ast.Constant) and "b" not in mode.value
    if name in ("run", "Popen", "check_output"):
        return any(key in keywords for key in ("text", "universal_newlines"))
    if name == "FileHandler":
        return True
    return name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_never_opened_in_the_locales_encoding(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and opens_in_locale(node)]
    assert found == []


@pytest.mark.parametrize(("kind", "locale"), [("no UTF-8", "UTF-8"), ("another alphabet", "ASCII")])
def test_files_are_read_under_any_name_and_locale(golden: Path, tmp_path: Path, kind: str, locale: str) -> None:
    """Text, dictionary, checkpoint, datastore, index and clusters; what is written has a name that can be decoded."""
    folder = os.fsencode(tmp_path) + b"/" + NAMES[kind]
    shutil.copytree(os.fsencode(golden), folder)
    script = """
import sys
from fairseq_cli import eval_lm, preprocess
folder, new = sys.argv[1:]
store = f"{folder}/checkpoints/"
for module, words in (
    (preprocess, ["--only-source", "--trainpref", f"{folder}/text/wiki.valid.tokens", "--destdir", new]),
    (preprocess, ["--only-source", "--testpref", f"{folder}/text/wiki.test.tokens", "--destdir", f"{new}/again",
                  "--srcdict", f"{folder}/data-bin/dict.txt"]),
    (eval_lm, [f"{folder}/data-bin", "--path", f"{folder}/checkpoints/checkpoint_best.pt", "--no-progress-bar",
               "--knnlm", "--dstore-filename", f"{store}dstore16", "--dstore-fp16", "--dstore-size", "16938",
               "--indexfile", f"{store}knn16.index", "--members", f"{store}kmeans_s40000000_k400_members.pkl",
               "--k", "8", "--lmbda", "0.2", "--results-json", f"{new}/results.json", "--results-path", new]),
):
    sys.argv = [module.__name__, *words]
    module.cli_main()
"""
    environment = {**os.environ, **LOCALES[locale], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, folder, tmp_path / "new"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"Perplexity:" in done.stderr and b"Wrote preprocessed data to" in done.stdout
    assert (tmp_path / "new" / "results.json").exists() and (tmp_path / "new" / "eval_lm.log").stat().st_size
    log = (tmp_path / "new" / "preprocess.log").read_text(encoding="utf-8").splitlines()
    assert log[0].startswith("Namespace(") and log[-1].startswith("Wrote preprocessed data to")
    said = [line for line in log if "wiki.valid.tokens: " in line]
    assert len(said) == 1  # a line with the name is written, not lost


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("preprocess", "--destdir"),
        ("preprocess", "--trainpref"),
        ("preprocess", "--srcdict"),
        ("preprocess", "--source-lang"),
        ("train", "--save-dir"),
        ("train", "--restore-file"),
        ("eval_lm", "--path"),
        ("eval_lm", "--gen-subset"),
        ("eval_lm", "--dstore-mmap"),
        ("eval_lm", "--results-json"),
        ("eval_lm", "--results-path"),
        ("build_dstore", "--faiss_index"),
        ("kmeans", "--save"),
    ],
)
def test_an_empty_name_is_refused(
    run_cli: Any, tmp_path: Path, program: str, flag: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {
        "preprocess": ["--only-source", "--testpref", "text"],
        "train": ["data-bin", "--task", "language_modeling"],
        "eval_lm": ["data-bin"],
        "build_dstore": ["--dstore_mmap", "store", "--faiss_index", "index"],
        "kmeans": ["--dstore", "store", "--num-clusters", "4", "--sample", "4", "--save", "clusters"],
    }[program]
    done = run_cli(program, [*needed, flag, value], cwd=tmp_path)
    assert flag in done.error and ("empty" in done.error or f"found {value!r}" in done.error)
    assert list(tmp_path.iterdir()) == []
