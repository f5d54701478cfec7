"""Which files a command may replace: each flag that names an output, with each kind of existing file. Other kinds are
refused before any work, in one sentence, and are not changed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairseq.errors import BadFile
from fairseq.files.atomic_io import atomic_write, open_log, publish, temporary_path, write_json
from tests.kill.stages import GOLDEN, MODEL, STORE, TRAIN

KEYS = f"--dstore {GOLDEN}/checkpoints/dstore16 --dstore-size 16938 --dim 32"
SEARCH = f"--scores none {STORE} --dstore-size 16938"
INDEX = f"build_dstore --dstore_mmap {GOLDEN}/checkpoints/dstore16 --dstore_size 16938 --dimension 32 --dstore_fp16"
MERGE = f"greedy_merge {KEYS} --indexfile {GOLDEN}/checkpoints/knn16.index"
EVAL = f"eval_lm {MODEL} --gen-subset valid"
TEXT = f"{GOLDEN}/text/wiki.valid.tokens"

# A command and the output that its flag leads to.
OUTPUTS = {
    f"{INDEX} --faiss_index OUT/i": "i",
    f"{INDEX} --faiss_index  OUT/i": "i.trained",
    f"{INDEX} --faiss_index   OUT/i": "i.json",
    f"{INDEX} --faiss_index OUT/j --results-json OUT/r.json": "r.json",
    f"kmeans {KEYS} --num-clusters 3 --sample 9 --save OUT/k": "k_s9_k3_members.pkl",
    f"kmeans  {KEYS} --num-clusters 3 --sample 9 --save OUT/k": "k_s9_k3_clusters/indptr.npy",
    f"kmeans   {KEYS} --num-clusters 3 --sample 9 --save OUT/k": "k_s9_k3_members.pkl.json",
    f"kmeans {KEYS} --num-clusters 3 --sample 9 --save OUT/j --results-json OUT/r.json": "r.json",
    f"{MERGE} --save OUT/m": "m_merge9_members.pkl",
    f"{MERGE}  --save OUT/m": "m_size16938_k30_int32.npy",
    f"adaptret {SEARCH} --save OUT/g.pt": "g.pt",
    f"adaptret  {SEARCH} --save OUT/g.pt": "g.pt.last",
    f"adaptret   {SEARCH} --save OUT/g.pt": "g.pt.json",
    f"adaptret {SEARCH} --save OUT/g.pt --results-json OUT/r.json": "r.json",
    f"sweep {SEARCH} --output OUT/s": "s.json",
    f"sweep  {SEARCH} --output OUT/s": "s.csv",
    f"sweep   {SEARCH} --output OUT/s": "s.md",
    f"sweep {SEARCH} --output OUT/t --figure OUT/f": "f-methods.png",
    f"{EVAL} --results-json OUT/r.json": "r.json",
    f"{EVAL} --save-scores OUT/s": "s/targets.npy",
    f"{EVAL} --save-knnlm-dstore --dstore-mmap OUT/d": "d_keys.npy",
    f"{EVAL}  --save-knnlm-dstore --dstore-mmap OUT/d": "d.json",
    f"{EVAL} --results-path OUT": "eval_lm.log",
    f"train {GOLDEN}/data-bin {TRAIN} --save-dir OUT": "checkpoint_last.pt",
    f"train  {GOLDEN}/data-bin {TRAIN} --save-dir OUT": "checkpoint_best.pt",
    f"preprocess --only-source --trainpref {TEXT} --destdir OUT": "train.idx",
    f"preprocess  --only-source --trainpref {TEXT} --destdir OUT": "train.bin",
    f"preprocess   --only-source --trainpref {TEXT} --destdir OUT": "preprocess.log",
    f"preprocess    --only-source --trainpref {TEXT} --destdir OUT": "train.json",
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        server.bind(path.name)
        os.chdir(here)


NODES: dict[str, Callable[[Path], object]] = {
    "the pipe": os.mkfifo,
    "the socket": _socket,
    "the symbolic link": lambda path: path.symlink_to(path.parent / "target"),
    "the folder": os.mkdir,
}
FOREIGN: dict[str, Callable[[Path], object]] = {
    "keys": lambda path: shutil.copyfile(GOLDEN / "checkpoints" / "dstore16_keys.npy", path),
    "checkpoint": lambda path: shutil.copyfile(GOLDEN / "checkpoints" / "checkpoint_best.pt", path),
    "index": lambda path: shutil.copyfile(GOLDEN / "checkpoints" / "knn16.index", path),
    "settings": lambda path: path.write_text('{"learning": "rate"}\n'),
    "notes": lambda path: path.write_text("Notes of the user\n"),
    "another's description": lambda path: write_json(path, {"kind": "another", "format_version": 1}),
}
OWN = {  # what is of the output's own kind, or cannot be told from it
    "keys": ("train.bin", "d_keys.npy"),
    "checkpoint": ("checkpoint_last.pt", "checkpoint_best.pt", "g.pt.last"),
    "index": ("i", "i.trained"),
    "settings": ("preprocess.log", "eval_lm.log", "train.bin", "d_keys.npy"),
    "notes": ("preprocess.log", "eval_lm.log", "train.bin", "d_keys.npy"),
    "another's description": ("preprocess.log", "eval_lm.log"),
}


def refused(line: str, folder: Path, run_cli: Any) -> str:
    command, *words = line.replace("OUT", str(folder)).split()
    return str(run_cli(command, words, cwd=folder).error)


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("line", OUTPUTS)
def test_only_regular_files_are_replaced(line: str, kind: str, tmp_path: Path, run_cli: Any) -> None:
    path = tmp_path / OUTPUTS[line]
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "target").write_text("the user's")
    NODES[kind](path)
    before = os.lstat(path)
    error = refused(line, tmp_path, run_cli)
    assert str(path) in error and kind.split()[-1] in error
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "target").read_text() == "the user's"


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("line", OUTPUTS)
def test_files_of_another_kind_are_kept(line: str, kind: str, tmp_path: Path, run_cli: Any) -> None:
    if OUTPUTS[line] in OWN[kind]:
        return
    path = tmp_path / OUTPUTS[line]
    path.parent.mkdir(exist_ok=True)
    FOREIGN[kind](path)
    before = path.read_bytes()
    error = refused(line, tmp_path, run_cli)
    assert str(path) in error and "which is not " in error and "--force" in error
    assert path.read_bytes() == before


def test_results_replace_results(tmp_path: Path, run_cli: Any) -> None:
    """Kinds of this package; a sidecar has other fields, and an empty file is of no kind."""
    results, line = tmp_path / "r.json", f"{EVAL} --results-json OUT/r.json"
    results.touch()
    for _ in range(2):
        command, *words = line.replace("OUT", str(tmp_path)).split()
        assert run_cli(command, words, cwd=tmp_path).status == 0
    write_json(results, {"kind": "datastore", "format_version": 1})
    assert "which is not a results file" in refused(line, tmp_path, run_cli)
    assert json.loads(results.read_text())["kind"] == "datastore"


@pytest.mark.parametrize("name", ["", "OUT/", "OUT/\udcff", "OUT/" + "x" * 250])
@pytest.mark.parametrize(
    "line",
    [
        f"{INDEX} --faiss_index NAME",
        f"{INDEX} --faiss_index OUT/j --results-json NAME",
        f"kmeans {KEYS} --num-clusters 3 --sample 9 --save NAME",
        f"{MERGE} --save NAME",
        f"adaptret {SEARCH} --save NAME",
        f"sweep {SEARCH} --output NAME",
        f"sweep {SEARCH} --output OUT/s --figure NAME",
        f"{EVAL} --results-json NAME",
        f"{EVAL} --save-knnlm-dstore --dstore-mmap NAME",
        f"{EVAL} --save-scores NAME",
        f"{EVAL} --results-path NAME",
        f"train {GOLDEN}/data-bin {TRAIN} --save-dir NAME",
        f"train {GOLDEN}/data-bin {TRAIN} --save-dir OUT/c --results-json NAME",
        f"preprocess --only-source --trainpref {TEXT} --destdir NAME",
    ],
)
def test_names_that_are_none(line: str, name: str, tmp_path: Path, run_cli: Any) -> None:
    flag = next(word for word, value in zip(line.split(), line.split()[1:]) if value == "NAME")
    if name == "OUT/" and flag in ("--save-scores", "--results-path", "--save-dir", "--destdir"):
        return  # a folder is what these name
    words = [name.replace("OUT", str(tmp_path)) if word == "NAME" else word for word in line.split()]
    command, *words = (word.replace("OUT", str(tmp_path)) for word in words)
    assert flag in run_cli(command, words, cwd=tmp_path).error
    assert not list(tmp_path.iterdir())


def test_links_are_not_written_through(tmp_path: Path) -> None:
    """Errors of every kind of writing: to a file, to a log, from another library."""
    (tmp_path / "target").write_text("the user's")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(BadFile, match="a symbolic link"), atomic_write(link):
        pass
    with pytest.raises(BadFile, match="a symbolic link"):
        open_log(link)
    temporary_path(link).write_text("new")
    with pytest.raises(BadFile, match="a symbolic link"):
        publish(temporary_path(link), link)
    assert (tmp_path / "target").read_text() == "the user's" and link.is_symlink()
    temporary_path(tmp_path / "out").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "out") as stream:  # a link in the place of the temporary file goes away
        stream.write(b"new")
    assert (tmp_path / "target").read_text() == "the user's" and (tmp_path / "out").read_text() == "new"
