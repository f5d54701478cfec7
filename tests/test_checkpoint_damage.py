"""Checkpoints whose bytes are not those that were saved, and paths that are no files: each is one sentence, however the
tensors are read."""

import os
import random

import pytest
import torch

from fairseq import refusals
from fairseq.checkpoint_utils import check_parameters, load_model_ensemble, read_torch_file
from fairseq.errors import BadFile, MissingFile, UserError
from fairseq.files import torch_files

WHAT = "a file of the test"


@pytest.fixture
def tensors():
    torch.manual_seed(1)
    shared = torch.randn(300, 40)
    return {"model": {"a": shared, "tied": shared, "view": shared[:, 3], "small": torch.arange(5.0)}}


def save(path, content, legacy: bool):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def read_all(path, mmap):
    content = torch_files.read_torch_file(path, WHAT, mmap)
    if mmap:
        check = torch_files.StorageCheck(os.fspath(path), WHAT)
        for tensor in content["model"].values():
            check(tensor)
    return content


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_of_any_tensor_is_noticed(tensors, tmp_path, mmap) -> None:
    path = save(tmp_path / "a.pt", tensors, legacy=False)
    good = path.read_bytes()
    assert torch.equal(read_all(path, mmap)["model"]["view"], tensors["model"]["view"])
    places = [good.index(tensors["model"][name].numpy().tobytes()[:16]) + 5 for name in ("a", "small")]
    for place in [*places, places[0] + 47990]:
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(BadFile, match="has bytes that its CRC does not fit"):
                read_all(path, mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_damage_anywhere_is_noticed_or_changes_nothing(tensors, tmp_path, mmap) -> None:
    path = save(tmp_path / "a.pt", tensors, legacy=False)
    good, rng = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        start = rng.randrange(len(bad))
        kind = rng.choice(["flip", "cut", "zero"])
        if kind == "flip":
            bad[start] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del bad[start:]
        else:
            bad[start : start + 32] = bytes(len(bad[start : start + 32]))
        path.write_bytes(bad)
        try:
            content = read_all(path, mmap)
        except UserError:
            refused += 1
        else:
            assert all(torch.equal(value, content["model"][name]) for name, value in tensors["model"].items())
    assert refused > 100


def test_a_file_saved_without_crcs_can_be_forced(tensors, tmp_path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pt", tensors, legacy=False)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(BadFile, match="--force"):
        read_all(path, False)
    refusals._state["force"] = True
    try:
        assert torch.equal(read_all(path, False)["model"]["a"], tensors["model"]["a"])
    finally:
        refusals.reset()


@pytest.mark.parametrize("change", [lambda b: b + b"x", lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b[:14]])
def test_an_old_container_of_another_length_is_refused(tensors, tmp_path, change) -> None:
    path = save(tmp_path / "a.pt", tensors, legacy=True)
    assert torch.equal(read_all(path, False)["model"]["a"], tensors["model"]["a"])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadFile):
        read_all(path, False)


def test_weights_that_are_no_numbers_are_refused(golden, tmp_path) -> None:
    state = read_torch_file(golden / "checkpoints" / "checkpoint_best.pt")
    state["model"]["decoder.layers.0.fc1.bias"][3] = float("nan")
    path = save(tmp_path / "a.pt", state, legacy=True)
    with pytest.raises(BadFile, match=r"not finite in decoder\.layers\.0\.fc1\.bias"):
        load_model_ensemble([str(path)], {"data": str(golden / "data-bin")})


@pytest.mark.parametrize("parameters", [None, [], {1: torch.ones(1)}, {"a": 3}])
def test_what_is_no_dictionary_of_tensors_is_refused(parameters) -> None:
    with pytest.raises(BadFile):
        check_parameters("a.pt", torch.nn.Module(), parameters)


@pytest.mark.parametrize("kind", ["fifo", "folder", "nothing", "device", "empty", "text"])
def test_what_is_no_checkpoint_is_said_without_waiting(tmp_path, kind) -> None:
    path = tmp_path / "a.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = "/dev/zero"
    elif kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"some text")
    with pytest.raises((BadFile, MissingFile)):
        read_torch_file(path)
