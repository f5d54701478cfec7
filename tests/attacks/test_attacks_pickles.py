"""Pickles that attack: code inside members files and checkpoints of both containers, at any depth, and small files that
would use all memory or endless time. Each ends in one sentence, nothing is executed, and memory stays limited."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from fairseq import checkpoint_utils
from fairseq.files import safe_pickle
from fairseq.retrieval.clusters import load_clusters
from tests.attacks.bounded import sentence

CODE = "open('CANARY', 'w').close()"


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Array(np.ndarray):
    """An array whose reduction hides a call in its state."""

    payload: Any

    def __reduce__(self) -> Any:
        function, arguments, state = np.asarray(self).__reduce__()
        return function, arguments, (*state[:-1], self.payload)


def in_array_state(call: Call) -> Any:
    array = np.zeros(3).view(Array)
    array.payload = call
    return array


def in_csr_state(call: Call) -> Any:
    matrix = scipy.sparse.csr_matrix(np.eye(3))
    matrix.__dict__["payload"] = call
    return matrix


PLACES: dict[str, Callable[[Call], Any]] = {
    "outermost": lambda call: call,
    "in a dictionary": lambda call: {"args": call},
    "as a key": lambda call: {call: 1},
    "in a namespace": lambda call: argparse.Namespace(lr=[call]),
    "in an object array": lambda call: np.array([call, 1], dtype=object),
    "in an array's state": in_array_state,
    "in a sparse matrix": in_csr_state,
    "deep inside": lambda call: [[[[{"x": (call,)}]]]],
}
CALLS = {
    "os.system": Call(os.system, "touch CANARY"),
    "eval": Call(eval, CODE),
    "exec": Call(exec, CODE),
    "getattr of a class": Call(getattr, int, "__subclasses__"),
    "map": Call(map, os.system, ["touch CANARY"]),
    "open": Call(open, "CANARY", "w"),
    "import": Call(builtins.__import__, "this"),
    "numpy loader": Call(np.load, "CANARY", None, True),
    "a storage's bytes": Call(torch.storage._load_from_bytes, pickle.dumps(1)),
}


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "CANARY").exists(), "code of the file was executed"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_code_in_members(name: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(pickle.dumps(PLACES[place](CALLS[name])))
    with pytest.raises(safe_pickle.RefusedGlobal, match=r"members\.pkl: found the Python object"):
        load_clusters(str(path), 10)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_code_in_checkpoints(place: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    content = {"model": {"w": torch.ones(2)}, "args": PLACES[place](CALLS["os.system"])}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(safe_pickle.RefusedGlobal, match=r"model\.pt: found the Python object"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_code_in_checkpoints_through_the_command(golden: Path, run_cli: Any, tmp_path: Path) -> None:
    torch.save({"model": {}, "args": CALLS["eval"]}, tmp_path / "m.pt")
    error = run_cli("eval_lm", [golden / "data-bin", "--path", tmp_path / "m.pt"], cwd=tmp_path).error
    assert "found the Python object builtins.eval inside" in error


def laughs(depth: int = 64) -> Any:
    """A tuple of two tuples of two tuples ...: a line of pickle each, but 2^64 steps to hash."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


class Key:
    """Pickles a dictionary with `key`, without ever hashing it here."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def __reduce__(self) -> Any:
        return Pairs, (), None, None, iter([(self.key, 1)])


class Pairs(dict[Any, Any]):
    """A placeholder for `dict` in the pickle, whose name is inserted afterwards."""


def key_of(key: Any) -> bytes:
    raw = pickle.dumps(Key(key), 2)
    return raw.replace(b"c" + Pairs.__module__.encode() + b"\nPairs\n", b"c__builtin__\ndict\n")


def announced(instruction: bytes, length: int) -> bytes:
    """A string or byte array that says it is longer than the file."""
    return b"\x80\x05" + instruction + struct.pack("<Q", length) + b"x."


BOMBS: dict[str, bytes] = {
    "list of a range": pickle.dumps(Call(list, range(10**11))),
    "set of a range": pickle.dumps(Call(set, range(10**11))),
    "zeros": pickle.dumps(Call(bytes, 10**12)),
    "byte array": pickle.dumps(Call(bytearray, 10**12)),
    "text of nested tuples": pickle.dumps(Call(str, laughs())),
    "number of many digits": pickle.dumps(Call(int, "9" * 100000)),
    "key of nested tuples": key_of(laughs()),
    "set of nested tuples": pickle.dumps(Call(frozenset, [laughs()])),
    "array of a size": pickle.dumps(Call(np.ndarray, (10**6, 10**6))),
    "matrix of a shape": pickle.dumps(Call(scipy.sparse.csr_matrix, (2 * 10**9, 2))),
    "matrix made anew": pickle.dumps(Call(pickle.loads, b"")),
    "storage of a size": pickle.dumps(Call(torch.FloatStorage, 10**12)),
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "text": announced(pickle.BINUNICODE8, 1 << 40),
    "bytes": announced(pickle.BINBYTES8, 1 << 62),
    "byte array in place": announced(pickle.BYTEARRAY8, 1 << 36),
    "long": b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF) + b".",
    "unfinished nesting": b"\x80\x02" + b"(" * 100000,
    "nested lists": b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_members(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(BOMBS[bomb])
    assert "members.pkl: found" in sentence(load_clusters, str(path), 10)


class DType:
    """Pickles as the dtype int64 in some state."""

    def __init__(self, copy: bool, *state: Any) -> None:
        self.parts = np.dtype, ("i8", False, copy), state

    def __reduce__(self) -> Any:
        return self.parts


DTYPES = {
    "shared, of another byte order": DType(False, 3, ">", None, None, None, -1, -1, 0),
    "flags of pointers": DType(True, 3, "<", None, None, None, -1, -1, 63),
    "another size": DType(True, 3, "<", None, None, None, 1 << 40, -1, 0),
    "fields": DType(True, 3, "<", None, ("a",), {"a": (np.dtype("i8"), 1 << 30)}, 16, 8, 0),
    "a number as state": DType(True, 3),
}


@pytest.mark.parametrize("kind", DTYPES)
def test_states_that_numpy_would_believe(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(pickle.dumps(DTYPES[kind]))
    assert "with an unusual state" in sentence(load_clusters, str(path), 10)


class Storage:
    """Announces a tensor of `count` elements in the record `key`."""

    def __init__(self, key: str, count: int) -> None:
        self.reference = ("storage", torch.FloatStorage, key, "cpu", count)


class Tensor:
    def __init__(self, storage: Storage, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.call = torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    def __reduce__(self) -> Any:
        return self.call


class TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, Storage) else None


TENSORS = {
    "larger than its record": Tensor(Storage("0", 10**11), (10**11,), (1,)),
    "beyond its storage": Tensor(Storage("0", 4), (10**10,), (1,)),
    "behind its storage": Tensor(Storage("0", 4), (2,), (1,), 10**9),
    "of strides that reach far": Tensor(Storage("0", 4), (2, 2), (10**9, 1)),
    "repeated without end": Tensor(Storage("0", 4), (10**12,), (0,)),
    "negative": Tensor(Storage("0", 4), (-1,), (1,)),
    "of a missing record": Tensor(Storage("7", 4), (4,), (1,)),
}


def checkpoint_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    TensorPickler(stream, 2).dump(content)
    return stream.getvalue()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_the_file_does_not_hold(kind: str, mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        content = {"model": {"w": TENSORS[kind]}, "args": argparse.Namespace()}
        archive.writestr("archive/data.pkl", checkpoint_bytes(content))
        archive.writestr("archive/data/0", np.ones(4, np.float32).tobytes())
        archive.writestr("archive/version", "3\n")
    assert "model.pt: found" in sentence(checkpoint_utils.load_checkpoint_to_cpu, path, None, mmap)


class LegacyPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return (*obj.reference, None) if isinstance(obj, Storage) else None


@pytest.mark.parametrize("kind", sorted(TENSORS.keys() - {"of a missing record"}))  # legacy files have no records
def test_tensors_in_legacy_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    stream = io.BytesIO()
    for part in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
        pickle.dump(part, stream, 2)
    LegacyPickler(stream, 2).dump({"model": {"w": TENSORS[kind]}, "args": argparse.Namespace()})
    pickle.dump(["0"], stream, 2)
    path.write_bytes(stream.getvalue() + struct.pack("<q", 4) + np.ones(4, np.float32).tobytes())
    assert "model.pt: found" in sentence(checkpoint_utils.load_checkpoint_to_cpu, path)


def test_compressed_containers(tmp_path: Path) -> None:
    """A zip bomb: a thousand times its length, once unpacked."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10**7 + b"N.")
    assert "compressed or overlapping" in sentence(checkpoint_utils.load_checkpoint_to_cpu, path)


def test_whole_files_still_load(golden: Path) -> None:
    """The limits leave room for what is genuine."""
    state = checkpoint_utils.load_checkpoint_to_cpu(golden / "checkpoints" / "checkpoint_best.pt")
    assert state["model"]
    members = golden / "checkpoints" / "kmeans_s40000000_k400_members.pkl"
    assert load_clusters(str(members), 16938).count == 400
