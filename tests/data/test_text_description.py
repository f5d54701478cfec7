"""The sidecar of a binarised split: any changed byte of the text, and any changed word of the dictionary, is detected
on opening; splits of other programs open without a sidecar."""

import json
import os
import random

import numpy as np
import pytest

from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import make_builder
from fairseq.data.text_description import describe_text
from fairseq.errors import BadFile, UserError
from fairseq.evaluation.datastore_checks import OK, WRONG, verify_artefact


@pytest.fixture
def dictionary():
    words = Dictionary()
    for number in range(20):
        words.add_symbol(f"w{number}")
    return words


@pytest.fixture(params=["mmap", "cached", "raw"])
def split(request, tmp_path, dictionary):
    path = str(tmp_path / "train")
    if request.param == "raw":
        (tmp_path / "train").write_text("w1 w2\nw3\n" * 30)
    else:
        builder = make_builder(path + ".bin", request.param, len(dictionary))
        builder.add_items(np.tile(np.arange(4, 16, dtype=np.int32), 20), np.array([5, 7] * 20))
        builder.finalize(path + ".idx")
    describe_text(path, dictionary)
    return path


def opened(split, dictionary):
    return data_utils.load_indexed_dataset(split, dictionary)


def test_the_text_that_was_written_opens_and_verifies(split, dictionary) -> None:
    assert len(opened(split, dictionary)) in (40, 60)
    assert {finding.level for finding in verify_artefact(split)} == {OK}


def test_any_other_byte_is_noticed(split, dictionary) -> None:
    rng = random.Random(5)
    files = [split + ending for ending in (".bin", ".idx", "") if os.path.isfile(split + ending)]
    for file in files:
        with open(file, "rb") as stream:
            good = stream.read()
        for _ in range(20):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            with open(file, "wb") as stream:
                stream.write(bad)
            with pytest.raises(BadFile, match=r"train\.json"):
                opened(split, dictionary)
        assert WRONG in {finding.level for finding in verify_artefact(split)}
        for other in (good[:-1], good + b"\0", b""):
            with open(file, "wb") as stream:
                stream.write(other)
            with pytest.raises(UserError):
                opened(split, dictionary)
        with open(file, "wb") as stream:
            stream.write(good)


def test_a_dictionary_in_another_order_is_refused_and_a_longer_one_is_not(split, dictionary) -> None:
    dictionary.add_symbol("new")
    assert len(opened(split, dictionary))
    dictionary.symbols[5], dictionary.symbols[6] = dictionary.symbols[6], dictionary.symbols[5]
    with pytest.raises(BadFile, match="binarised with another dictionary of 24 words"):
        opened(split, dictionary)


def test_without_a_sidecar_it_opens(split, dictionary) -> None:
    os.remove(split + ".json")
    assert len(opened(split, dictionary))


@pytest.mark.parametrize("content", [{"kind": "text"}, {"kind": "datastore"}, {"kind": "text", "content": 3}])
def test_a_sidecar_that_says_little_is_no_reason_to_stop(split, dictionary, content) -> None:
    with open(split + ".json", "w") as stream:
        json.dump({**content, "format_version": 1}, stream)
    assert len(opened(split, dictionary))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_pipes_and_folders_are_refused_without_waiting(tmp_path, dictionary, ending) -> None:
    path = str(tmp_path / "train")
    builder = make_builder(path + ".bin", "mmap", len(dictionary))
    builder.add_items(np.arange(4, 9), np.array([5]))
    builder.finalize(path + ".idx")
    for make in (os.mkfifo, os.mkdir):
        os.remove(path + ending)
        make(path + ending)
        with pytest.raises(UserError):
            opened(path, dictionary)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge"])
def test_a_dictionary_is_a_file_of_some_size(tmp_path, kind) -> None:
    path = tmp_path / "dict.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as stream:
            stream.truncate(1 << 40)
    with pytest.raises(UserError):
        Dictionary.load("/dev/zero" if kind == "device" else str(path))
