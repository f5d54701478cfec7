"""prepare-wikitext-103.sh on stand-in text: from folders, archives and a hub on this machine; what it counts, refuses
and goes on with. The genuine text is far too large for a test; its published figures were compared with it once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "language_model" / "prepare-wikitext-103.sh"
ROWS = {  # as the hub has them: an empty row was a line with one space
    "train": ["", " = A Title = \n", "", " The café , at last , opened in 1 @,@ 250 cities . \n"] * 30,
    "validation": ["", " one <unk> three \n"],
    "test": [" a b c \n"],
}
TEXTS = {name: "".join(row or " \n" for row in rows).encode() for name, rows in ROWS.items()}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_wikitext_103", SCRIPT.with_name("prepare_wikitext_103.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepare(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """prepare(flags): runs the script in this process, in tmp_path."""

    def run(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["prepare_wikitext_103.py", *map(str, flags)])
        monkeypatch.chdir(tmp_path)
        script.main()

    return run


@pytest.fixture
def small(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the published text by a stand-in."""
    for split, text in zip(("train", "valid", "test"), TEXTS.values(), strict=True):
        tokens = len(text.split()) + text.count(b"\n")
        hashed = len(text) // 2
        digest = hashlib.sha256(text[:hashed]).hexdigest()
        published = script.Published(text.count(b"\n"), tokens, hashed, digest, script.PUBLISHED[split].parquet)
        monkeypatch.setitem(script.PUBLISHED, split, published)


def token_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / f"wiki.{name.replace('validation', 'valid')}.tokens").write_bytes(text)
    return folder


def check_written(folder: Path) -> None:
    for name, text in TEXTS.items():
        assert (folder / f"wiki.{name.replace('validation', 'valid')}.tokens").read_bytes() == text
    assert {path.name for path in folder.iterdir()} == {"wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"}


# ---------------------------------------------------------------------------------------------------------------------
# Local files


def test_the_shell_script_from_a_folder(tmp_path: Path) -> None:
    """As a user types it, from another folder; counts are printed, and that they were not compared."""
    token_files(tmp_path / "mine")
    command = ["bash", str(SCRIPT), "--local", "mine", "--no-verify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_written(tmp_path / "wikitext-103")
    assert "wiki.valid.tokens: 2 lines, 5 tokens (--no-verify: not compared with the published text)" in done.stdout


@pytest.mark.parametrize("inside", ["", "wikitext-103/"])
def test_an_archive(prepare: Any, small: None, tmp_path: Path, inside: str) -> None:
    folder = token_files(tmp_path / "mine")
    with zipfile.ZipFile(tmp_path / "wikitext-103-v1.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, inside + path.name)
    prepare("--local", "wikitext-103-v1.zip", "--dest", "out")
    check_written(tmp_path / "out")


def test_other_text_is_refused_and_leaves_nothing_behind(prepare: Any, script: ModuleType, tmp_path: Path) -> None:
    token_files(tmp_path / "mine")
    with pytest.raises(script.BadFile, match=r"wiki.valid.tokens: found 2 lines, expected 3760, .*--no-verify"):
        prepare("--local", "mine", "--dest", "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_first_bytes_are_compared_too(prepare: Any, small: None, script: ModuleType, tmp_path: Path) -> None:
    folder = token_files(tmp_path / "mine")
    text = (folder / "wiki.train.tokens").read_bytes()
    (folder / "wiki.train.tokens").write_bytes(text.replace(b"Title", b"Fitle", 1))
    with pytest.raises(script.BadFile, match="sha256"):
        prepare("--local", "mine", "--dest", "out")


def test_a_finished_file_is_kept_and_compared(
    prepare: Any, small: None, script: ModuleType, tmp_path: Path
) -> None:
    token_files(tmp_path / "mine")
    prepare("--local", "mine", "--dest", "out")
    kept = tmp_path / "out" / "wiki.train.tokens"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "wiki.test.tokens").unlink()
    prepare("--local", "mine", "--dest", "out")
    check_written(tmp_path / "out")
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"something else\n")
    with pytest.raises(script.BadFile, match="wiki.train.tokens: found 1 lines"):
        prepare("--local", "mine", "--dest", "out")


@pytest.mark.parametrize("what", ["nothing", "wiki.train.tokens", "empty"])
def test_sources_that_cannot_be_used(prepare: Any, script: ModuleType, tmp_path: Path, what: str) -> None:
    (tmp_path / "wiki.train.tokens").write_text("not an archive")
    (tmp_path / "empty").mkdir()
    with pytest.raises(script.UserError, match=what):
        prepare("--local", what, "--dest", "out")


def test_counting_does_not_depend_on_where_chunks_end(script: ModuleType) -> None:
    text = TEXTS["train"]
    for size in (1, 2, 7, 1000):
        found = script.Measured(50)
        for start in range(0, len(text), size):
            found.add(text[start : start + size])
        assert (found.lines, found.tokens) == (text.count(b"\n"), len(text.split()) + text.count(b"\n"))
        assert found.sha256 == hashlib.sha256(text[:50]).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# A hub on this machine


class Hub(BaseHTTPRequestHandler):
    """Serves a listing and files; drops the connection once after `breaks_after` bytes, if set."""

    files: dict[str, bytes]
    breaks_after: int | None
    asked: list[tuple[str, str | None]]
    lies: bool

    def do_GET(self) -> None:  # noqa: N802
        start = self.headers.get("Range")
        type(self).asked.append((self.path, start))
        if self.path.endswith("/tree/main/wikitext-103-v1"):
            entries: list[dict[str, Any]] = [{"type": "file", "path": "wikitext-103-v1/README.md", "size": 3}]
            for name, content in self.files.items():
                digest = hashlib.sha256(b"other" if self.lies else content).hexdigest()
                entries.append({"path": f"wikitext-103-v1/{name}", "size": len(content), "lfs": {"oid": digest}})
            body, status = json.dumps(entries).encode(), 200
        else:
            name = self.path.rpartition("/")[2]
            assert self.path == f"/datasets/Salesforce/wikitext/resolve/main/wikitext-103-v1/{name}"
            skip = int(start.removeprefix("bytes=").removesuffix("-")) if start else 0
            body, status = self.files[name][skip:], 206 if start else 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.breaks_after is not None and status == 200 and "resolve" in self.path:
            body, type(self).breaks_after = body[: self.breaks_after], None
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Hub], str]]:
    """(handler, address). Files hold JSON rows; the reader of Parquet is replaced accordingly."""

    def json_chunks(files: list[Path]) -> Iterator[bytes]:
        for file in files:
            yield "".join(row or " \n" for row in json.loads(file.read_bytes())).encode()

    monkeypatch.setattr(script, "parquet_chunks", json_chunks)
    half = len(ROWS["train"]) // 2
    rows = {
        "train-00000-of-00002": ROWS["train"][:half],
        "train-00001-of-00002": ROWS["train"][half:],
        "validation-00000-of-00001": ROWS["validation"],
        "test-00000-of-00001": ROWS["test"],
    }
    files = {f"{name}.parquet": json.dumps(part).encode() for name, part in rows.items()}
    handler = type("ThisHub", (Hub,), {"files": files, "breaks_after": None, "asked": [], "lies": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(prepare: Any, small: None, hub: Any, tmp_path: Path) -> None:
    handler, address = hub
    prepare("--dest", "out", "--hub", address + "/")
    check_written(tmp_path / "out")
    assert len(handler.asked) == 5


def test_a_broken_download_goes_on(prepare: Any, small: None, script: ModuleType, hub: Any, tmp_path: Path) -> None:
    handler, address = hub
    handler.breaks_after = 100
    with pytest.raises(script.UserError, match=r"ended after 100 of \d+ bytes; run this again"):
        prepare("--dest", "out", "--hub", address)
    handler.asked.clear()
    prepare("--dest", "out", "--hub", address)
    check_written(tmp_path / "out")
    assert [start for _, start in handler.asked if start] == ["bytes=100-"]


def test_bytes_that_the_hub_does_not_vouch_for_are_refused(
    prepare: Any, small: None, script: ModuleType, hub: Any, tmp_path: Path
) -> None:
    handler, address = hub
    handler.lies = True
    with pytest.raises(script.BadFile, match="sha256"):
        prepare("--dest", "out", "--hub", address)
    assert list((tmp_path / "out" / "download").iterdir()) == []


def test_an_unreachable_hub_names_the_other_way(prepare: Any, script: ModuleType) -> None:
    with pytest.raises(script.UserError, match="could not be reached.*--local"):
        prepare("--hub", "http://127.0.0.1:9")


def test_parquet(script: ModuleType, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"text": ROWS["train"]}), path)
    assert b"".join(script.parquet_chunks([path])) == TEXTS["train"]
