"""FIFOs, folders, sockets, devices and broken links where a file is read: one sentence that says what is there, at
once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders.files import read_bytes
from fairseq.errors import UserError
from fairseq.files.array_files import map_array
from fairseq.models.huggingface.folders import read_config, require_regular_files
from fairseq.retrieval.clusters import load_clusters
from fairseq.retrieval.index import FaissIndex
from fairseq_cli import preprocess


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(path))  # names of sockets are short


NODES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "a FIFO"),
    "folder": (os.mkdir, "a folder"),
    "socket": (make_socket, "a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "a link to a file that does not exist"),
    "nothing": (lambda path: None, "no such file"),
}


def preprocessed(flags: str) -> Callable[[Path], object]:
    def run(path: Path) -> object:
        (path.parent / "text").write_text("a b c\n")
        words = flags.replace("FILE", str(path)).replace("TEXT", str(path.parent / "text")).split()
        destdir = ["--only-source", "--destdir", str(path.parent / "out")]
        return preprocess.main(options.parse_preprocessing_args([*words, *destdir]))

    return run


def raw_split(path: Path) -> object:
    return data_utils.load_indexed_dataset(str(path), Dictionary(), "raw")


READERS: dict[str, Callable[[Path], object]] = {
    "--trainpref": preprocessed("--trainpref FILE"),
    "--validpref": preprocessed("--trainpref TEXT --validpref TEXT,FILE"),
    "--testpref": preprocessed("--trainpref TEXT --testpref FILE"),
    "--srcdict": preprocessed("--trainpref TEXT --srcdict FILE"),
    "encoder": lambda path: read_bytes(str(path), "--bpe-codes", "codes"),
    "dictionary": lambda path: Dictionary.load(str(path)),
    "checkpoint": lambda path: checkpoint_utils.load_checkpoint_to_cpu(str(path)),
    "array": lambda path: map_array(str(path)),
    "members": lambda path: load_clusters(str(path), 5),
    "index": lambda path: FaissIndex(str(path), 5),
}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_named(reader: str, node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reader, node) == ("members", "folder"):
        return  # clusters as arrays are a folder
    monkeypatch.chdir(tmp_path)
    make, name = NODES[node]
    make(tmp_path / "file")
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path / "file")
    assert "file: " in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("node", ["FIFO", "socket", "device"])
def test_alignments_and_model_folders(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, name = NODES[node]
    make(tmp_path / "text.align")
    with pytest.raises(UserError, match=name):
        preprocessed("--trainpref TEXT --align-suffix align")(tmp_path / "file")
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=name):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match=name):
        require_regular_files(str(tmp_path))
