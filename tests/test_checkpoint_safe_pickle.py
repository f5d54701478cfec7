"""Pickles by allow-list: what plain data needs is read, whatever its age; what could run code is refused by name."""

import argparse
import collections
import io
import os
import pickle
import pickletools
import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch

from fairseq import checkpoint_utils
from fairseq.errors import BadFile, MissingFile
from fairseq.files import safe_pickle
from fairseq.files.safe_pickle import RefusedGlobal


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def roundtrip(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return safe_pickle.load(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_survives(tmp_path, protocol):
    content = {
        "args": argparse.Namespace(lr=[0.5], data="x"),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {1: [2]}),
        "set": {1, 2},
        "complex": 1 + 2j,
        "slice": slice(1, 2),
        "bytes": b"\x00\xff",
        "tuple": (None, True, 1.5),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "scalar": np.float64(4.83),
        "dtype": np.dtype("float16"),
    }
    loaded = roundtrip(content, tmp_path / "a.pkl", protocol)
    array, expected = loaded.pop("array"), content.pop("array")
    assert array.dtype == expected.dtype
    assert np.array_equal(array, expected)
    assert loaded == content


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_sparse_matrices_survive(tmp_path, protocol, kind):
    matrix = kind(np.eye(4, dtype=np.int8))
    loaded = roundtrip(matrix, tmp_path / "m.pkl", protocol)
    assert type(loaded) is kind
    assert np.array_equal(loaded.toarray(), matrix.toarray())


@pytest.mark.parametrize(
    ("new", "old"), [(b"scipy.sparse._csr", b"scipy.sparse.csr"), (b"numpy._core", b"numpy.core"), (b"", b"")]
)
def test_module_names_of_other_versions(tmp_path, new, old):
    raw = pickle.dumps(scipy.sparse.csr_matrix(np.eye(3)), 2)
    assert new in raw
    (tmp_path / "m.pkl").write_bytes(raw.replace(b"c" + new, b"c" + old) if new else raw)
    assert safe_pickle.load(tmp_path / "m.pkl").shape == (3, 3)


def test_golden_members_file_is_read(golden):
    members = safe_pickle.load(golden / "checkpoints" / "kmeans_s40000000_k400_members.pkl")
    assert scipy.sparse.issparse(members)
    assert members.shape[1] == 16938


def test_old_meters_become_inert_stubs(tmp_path, monkeypatch):
    module = types.ModuleType("fairseq.meters")

    class AverageMeter:
        pass

    AverageMeter.__module__, AverageMeter.__qualname__ = "fairseq.meters", "AverageMeter"
    module.AverageMeter = AverageMeter
    meter = AverageMeter()
    meter.avg = 3
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fairseq.meters", module)
        raw = pickle.dumps({"train_loss": meter}, 2)
    (tmp_path / "m.pkl").write_bytes(raw)
    loaded = safe_pickle.load(tmp_path / "m.pkl")["train_loss"]
    assert isinstance(loaded, safe_pickle.Inert)
    assert loaded.avg == 3


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (__import__, "builtins.__import__"),
        (pickle.loads, "_pickle.loads"),
        (torch.load, "torch.serialization.load"),
        (torch.storage._load_from_bytes, "torch.storage._load_from_bytes"),
        (np.load, "numpy.load"),
    ],
)
def test_calls_are_refused_by_name(tmp_path, function, name):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"members": Runs(function, "touch " + str(tmp_path / "ran"))}))
    with pytest.raises(RefusedGlobal) as caught:
        safe_pickle.load(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_dotted_names_do_not_reach_into_allowed_modules(tmp_path):
    # protocol 4 resolves "a.b" attribute by attribute
    raw = b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93."
    (tmp_path / "evil.pkl").write_bytes(raw)
    with pytest.raises(RefusedGlobal, match="torch.serialization.os.system"):
        safe_pickle.load(tmp_path / "evil.pkl")


def test_attributes_of_classes_cannot_be_changed(tmp_path):
    raw = b"\x80\x02cargparse\nNamespace\nN}U\x05ownerK\x01s\x86b."
    pickletools.dis(raw, out=io.StringIO())  # a well-formed pickle
    (tmp_path / "evil.pkl").write_bytes(raw)
    with pytest.raises(RefusedGlobal, match="Namespace"):
        safe_pickle.load(tmp_path / "evil.pkl")
    assert not hasattr(argparse.Namespace, "owner")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", pickle.dumps(np.arange(9))[:-20], b"\x80\x02K\x01b."])
def test_damaged_files_are_one_sentence(tmp_path, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        safe_pickle.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFile, match="nowhere.pkl: no such file"):
        safe_pickle.load(tmp_path / "nowhere.pkl")
    with pytest.raises(MissingFile, match="a folder, not a file"):
        safe_pickle.load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_calls_is_refused(tmp_path, zipped):
    path = tmp_path / "evil.pt"
    content = {"model": {"w": torch.ones(2)}, "args": Runs(os.system, "touch " + str(tmp_path / "ran"))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for mmap in (False, True):
        with pytest.raises(RefusedGlobal, match=r"evil\.pt: found the Python object \w+\.system"):
            checkpoint_utils.read_torch_file(path, mmap)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # a real program, as old files hold
def test_torchscript_programs_are_refused(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(RefusedGlobal, match="TorchScript"):
        checkpoint_utils.read_torch_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_all_types_and_shared_storage(tmp_path, zipped):
    path = tmp_path / "t.pt"
    base = torch.arange(6.0)
    content = {str(dtype): base.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool)}
    content |= {"view": base[2:4], "whole": base, "parameter": torch.nn.Parameter(base), "size": torch.Size([1])}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoint_utils.read_torch_file(path)
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded[key], content[key]) for key in content if key != "size")
    assert loaded["view"].untyped_storage().data_ptr() == loaded["whole"].untyped_storage().data_ptr()
