"""Sentences about missing files name similar files in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq.errors import MissingFile
from fairseq.retrieval.clusters import load_clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex

FILES = (
    "dstore16_keys.npy dstore16_vals.npy dstore16.json knn16.index knn16.indexed half_keys.npy.tmp half.progress.json "
    "part.index.trained values_vals.npy m_s10_k4_members.pkl"
).split()


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("dstore", "there is FOLDER/dstore16; check the prefix"),
        ("dstore61", "there is FOLDER/dstore16; check the prefix"),
        ("dstore16_keys.npy", "give the prefix of its files, FOLDER/dstore16"),
        ("dstore16_vals.npy", "give the prefix of its files, FOLDER/dstore16"),
        ("dstore16.json", "give the prefix of its files, FOLDER/dstore16"),
        ("", "this is a folder: give the prefix of files in it, FOLDER/dstore16, FOLDER/values"),
        ("half", "an unfinished one exists: run the command that writes it again"),
        ("values", "the values are there and the keys are not"),
        ("elsewhere/dstore16", "there is no folder FOLDER/elsewhere: check the path"),
        ("unlike", "no such file; check the prefix that was given for the datastore"),
    ],
)
def test_datastores(folder: Path, prefix: str, says: str) -> None:
    with pytest.raises(MissingFile) as caught:
        Datastore.open(str(folder / prefix))
    assert says.replace("FOLDER", str(folder)) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("knn.index", "there is FOLDER/knn16.index"),
        ("knn61.index", "there is FOLDER/knn16.index"),
        ("part.index", "an unfinished one exists"),
        ("nothing", "no such file; check --indexfile, or build it"),
    ],
)
def test_indexes(folder: Path, name: str, says: str) -> None:
    with pytest.raises(MissingFile) as caught:
        FaissIndex(str(folder / name), 5)
    assert says.replace("FOLDER", str(folder)) in str(caught.value)


def test_members(folder: Path) -> None:
    with pytest.raises(MissingFile, match=r"m_s10_k5_members.pkl: no such file; there is .*/m_s10_k4_members.pkl"):
        load_clusters(str(folder / "m_s10_k5_members.pkl"), 5)
