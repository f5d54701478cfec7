"""prepare-law-mt.sh on a few sentences: Moses' tokens, the codes' pieces, and one line out for each line in."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fairseq.errors import UserError

pytest.importorskip("sacremoses")
pytest.importorskip("subword_nmt")

SCRIPT = Path(__file__).parents[2] / "examples" / "language_model" / "prepare-law-mt.sh"
MERGES = ["t h", "th e</w>", "C o", "Co u", "Cou n", "Coun c", "Counc i", "Counci l</w>"]
RAW = "The Council's well-known decision & annexe, the rest.\n\nthe Council\n"


@pytest.fixture
def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """prepare(flags): runs the script in this process, in `folder`; returns what it logged."""
    spec = importlib.util.spec_from_file_location("prepare_law_mt", SCRIPT.with_name("prepare_law_mt.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare_law_mt.py", *flags])
        monkeypatch.chdir(folder)
        with caplog.at_level(logging.INFO):
            module.main()
        return caplog.text

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bpecodes").write_text("".join(f"{merge} {100 - i}\n" for i, merge in enumerate(MERGES)))
    (tmp_path / "codes").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in MERGES))
    (tmp_path / "train.en").write_text(RAW)
    (tmp_path / "dev.en").write_text("the\n")
    return tmp_path


def check(folder: Path, log: str) -> None:
    written = (folder / "law" / "train.txt").read_text()
    words = "The Council &apos;s well @-@ known decision &amp; annexe , the rest .\n\nthe Council\n"
    assert written.replace("@@ ", "") == words
    first = written.split("\n")[0].split()
    assert first[:4] == ["T@@", "h@@", "e", "Council"] and "the" in first
    assert (folder / "law" / "valid.txt").read_text() == "the\n"
    pieces = len(written.split())
    assert f"train.txt: 3 lines, {len(words.split())} words in {pieces} pieces, {pieces + 3} tokens" in log


def test_the_shell_script_with_fastbpe_codes(folder: Path) -> None:
    (folder / "many").write_text("the Council\n" * 2001 + "the\n")
    files = ["--train", "train.en", "--valid", "dev.en", "--codes", "bpecodes"]
    command = ["bash", str(SCRIPT), "--test", "many", "--workers", "2", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "law" / "test.txt").read_text() == (folder / "many").read_text()
    check(folder, done.stdout)


def test_codes_of_subword_nmt(folder: Path, prepare: Any) -> None:
    check(folder, prepare("--train", "train.en", "--valid", "dev.en", "--codes", "codes"))


def test_choices(folder: Path, prepare: Any) -> None:
    (folder / "train.en").write_text(RAW.replace("'", "\u2019"))
    flags = ("--no-escape", "--no-dash-splits", "--normalize-punctuation", "--dest", "out")
    prepare("--train", "train.en", "--codes", "bpecodes", *flags)
    words = (folder / "out" / "train.txt").read_text().replace("@@ ", "")
    assert words == "The Council 's well-known decision & annexe , the rest .\n\nthe Council\n"


def test_finished_files_are_kept(folder: Path, prepare: Any) -> None:
    (folder / "law").mkdir()
    (folder / "law" / "train.txt").write_text("kept\n")
    log = prepare("--train", "train.en", "--valid", "dev.en", "--codes", "codes")
    assert "train.txt exists and is left as it is" in log
    assert (folder / "law" / "train.txt").read_text() == "kept\n"
    assert (folder / "law" / "valid.txt").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--train", "train.en", "--codes", "nothing"), "nothing: no such file"),
        (("--train", "nothing", "--codes", "codes"), "nothing: no such file"),
        (("--codes", "codes"), "--train"),
        (("--train", "latin1", "--codes", "codes"), "latin1: found bytes that are not UTF-8"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, prepare: Any, flags: tuple[str, ...], said: str) -> None:
    (folder / "latin1").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=said):
        prepare(*flags)
    assert not (folder / "law").exists() or not list((folder / "law").iterdir())
