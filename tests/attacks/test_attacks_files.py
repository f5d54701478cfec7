"""Files with false sizes, offsets, types and names: each gives one sentence, and no memory is allocated for missing
bytes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset, MMapIndexedDataset, make_builder
from fairseq.flag_types import literal_dict
from fairseq.retrieval import kernels
from fairseq.retrieval.automaton import Automaton
from fairseq.retrieval.clusters import Clusters, load_clusters, save_clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.index import FaissIndex
from tests.attacks.bounded import bounded, sentence
from tests.descriptions import edit_description

FAR = 1 << 61


# ---------------------------------------------------------------------------------------------------------------------
# Text


def split(folder: Path, impl: str) -> str:
    builder = make_builder(str(folder / "x.bin"), impl, 100)
    for length in (3, 4, 5):
        builder.add_item(torch.arange(4, 4 + length))
    builder.finalize(str(folder / "x.idx"))
    return str(folder / "x")


def patched(path: Path, offset: int, layout: str, *numbers: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, offset, *numbers)
    path.write_bytes(raw)


MMAP_HEAD = 9 + 8 + 1 + 8
INDEXES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "many items": ("mmap", lambda p: patched(p, MMAP_HEAD - 8, "<Q", FAR)),
    "items whose table overflows": ("mmap", lambda p: patched(p, MMAP_HEAD - 8, "<Q", (1 << 64) // 12)),
    "a long item": ("mmap", lambda p: patched(p, MMAP_HEAD, "<i", 2**31 - 1)),
    "a negative length": ("mmap", lambda p: patched(p, MMAP_HEAD, "<i", -5)),
    "an offset outside": ("mmap", lambda p: patched(p, MMAP_HEAD + 12, "<q", 10**9)),
    "an offset that overflows": ("mmap", lambda p: patched(p, MMAP_HEAD + 12, "<q", (1 << 63) - 1)),
    "a negative offset": ("mmap", lambda p: patched(p, MMAP_HEAD + 12, "<q", -8)),
    "an unknown type": ("mmap", lambda p: patched(p, MMAP_HEAD - 9, "<B", 99)),
    "legacy, many items": ("lazy", lambda p: patched(p, 32, "<Q", FAR)),
    "legacy, many sizes": ("lazy", lambda p: patched(p, 40, "<Q", FAR)),
    "legacy, an offset outside": ("lazy", lambda p: patched(p, 48 + 4 * 8 + 3 * 8, "<q", 10**12)),
    "legacy, offsets backwards": ("lazy", lambda p: patched(p, 48 + 4 * 8 + 8, "<q", -3)),
}


@pytest.mark.parametrize("case", INDEXES)
def test_text_indexes(case: str, tmp_path: Path) -> None:
    impl, damage = INDEXES[case]
    prefix = split(tmp_path, impl)
    damage(tmp_path / "x.idx")
    assert "/x." in sentence(MMapIndexedDataset if impl == "mmap" else IndexedDataset, prefix)


def test_a_shape_that_does_not_fit_its_item(tmp_path: Path) -> None:
    prefix = split(tmp_path, "lazy")
    patched(tmp_path / "x.idx", (tmp_path / "x.idx").stat().st_size - 24, "<q", 10**12)
    assert "an item of shape" in sentence(lambda: IndexedDataset(prefix)[0])


def test_tokens_that_the_dictionary_does_not_have(golden: Path, run_cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data-bin"
    shutil.copytree(golden / "data-bin", folder)
    raw = np.fromfile(folder / "test.bin", np.uint16)
    raw[50] = 60000
    raw.tofile(folder / "test.bin")
    model = golden / "checkpoints" / "checkpoint_best.pt"
    for workers in (0, 2):
        flags = [folder, "--path", model, "--max-tokens", 128, "--num-workers", workers, "--no-progress-bar"]
        error = run_cli("eval_lm", flags).error
        assert error.startswith("eval_lm.py: error: the data: found token ids from ")
        assert "to 60000, expected 0 to" in error


DICTIONARIES = {
    "a missing count": b"one\ntwo 2\n",
    "a count that is none": b"one two\n",
    "a count of many digits": b"one " + b"9" * 10000 + b"\n",
    "a fraction": b"one 1.5\n",
    "a line without end": b"x" * (3 << 20),
    "zeros": b"\0" * (3 << 20),
    "other bytes": b"one 1\n\xff\xfe 2\n",
}


@pytest.mark.parametrize("case", DICTIONARIES)
def test_dictionaries(case: str, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_bytes(DICTIONARIES[case])
    assert "dict.txt: found" in sentence(Dictionary.load, str(tmp_path / "dict.txt"))


def test_a_dictionary_larger_than_memory_in_one_line(tmp_path: Path) -> None:
    with open(tmp_path / "dict.txt", "wb") as stream:
        stream.truncate(1 << 34)  # sparse: 16 GB of zeros
    assert "expected a dictionary of at most 1073741824" in sentence(Dictionary.load, str(tmp_path / "dict.txt"))


# ---------------------------------------------------------------------------------------------------------------------
# Datastores


@pytest.fixture
def datastore(tmp_path: Path) -> str:
    np.zeros((10, 4), "<f2").tofile(tmp_path / "d_keys.npy")
    np.arange(10).astype("<i8").tofile(tmp_path / "d_vals.npy")
    write_description(tmp_path)
    return str(tmp_path / "d")


def write_description(folder: Path, **changes: Any) -> None:
    description = {"kind": "datastore", "format_version": 1, "rows": 10, "dimension": 4, "key_dtype": "<f2"}
    (folder / "d.json").write_text(json.dumps({**description, "value_dtype": "<i8", **changes}))


CHANGES: dict[str, dict[str, Any]] = {
    "rows as text": {"rows": "10"},
    "rows as a fraction": {"rows": 10.0},
    "rows as truth": {"rows": True},
    "negative rows": {"rows": -10},
    "many rows": {"rows": 10**18},
    "rows beyond numbers": {"rows": 10**400},
    "a list of rows": {"rows": [10]},
    "no rows": {"rows": None},
    "another width": {"dimension": 5},
    "objects as keys": {"key_dtype": "O"},
    "a structure as keys": {"key_dtype": "<f2,<f2"},
    "a path as type": {"key_dtype": "../../etc/passwd"},
    "another kind": {"kind": "index"},
    "a kind that is none": {"kind": {"kind": "datastore"}},
    "a later version": {"format_version": 99},
    "a version as text": {"format_version": "1"},
}


@pytest.mark.parametrize("case", CHANGES)
def test_descriptions_with_wrong_types(case: str, datastore: str, tmp_path: Path) -> None:
    write_description(tmp_path, **CHANGES[case])
    assert "/d" in sentence(Datastore.open, datastore)


TEXTS = {
    "no JSON": b"rows: 10",
    "deep JSON": b"[" * 100000,
    "a list": b"[]",
    "a number": b"7",
    "a number of many digits": b'{"rows": ' + b"9" * 5000 + b"}",
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "more than a description": b" " * (17 << 20),
}


@pytest.mark.parametrize("case", TEXTS)
def test_descriptions_that_are_none(case: str, datastore: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_bytes(TEXTS[case])
    assert "d.json: found" in sentence(Datastore.open, datastore)


def test_a_description_names_no_files(datastore: str, tmp_path: Path) -> None:
    """Paths in a description are words: the files are those beside it."""
    write_description(tmp_path, keys="/etc/passwd", values="../../secret", prefix="/etc/passwd")
    assert bounded(lambda: Datastore.open(datastore).size) == 10


@pytest.mark.parametrize("name", ["keys", "vals"])
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("length", [0, 1, 79, 10**13])
def test_cut_and_oversized_arrays(name: str, described: bool, length: int, datastore: str, tmp_path: Path) -> None:
    path = tmp_path / f"d_{name}.npy"
    with open(path, "r+b") as stream:
        stream.truncate(length)
    if not described:
        (tmp_path / "d.json").unlink()
    said = sentence(Datastore.open, datastore, 10, 4, True)
    assert "d_keys.npy: found" in said or "d_vals.npy: found" in said


# ---------------------------------------------------------------------------------------------------------------------
# Members and indexes


ARRAYS: dict[str, tuple[str, Any]] = {
    "ids outside": ("members", np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10**6], np.int32)),
    "negative ids": ("members", np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, -1], np.int32)),
    "clusters outside": ("cluster_of", np.full(10, 77, np.int32)),
    "negative clusters": ("cluster_of", np.full(10, -1, np.int32)),
    "bounds outside": ("indptr", np.array([0, 5, 10**15])),
    "bounds backwards": ("indptr", np.array([0, 12, 10])),
    "fractions": ("members", np.linspace(0, 9, 10)),
    "fractions of clusters": ("cluster_of", np.linspace(0, 1, 10)),
    "structures": ("cluster_of", np.zeros(10, "i4,i4")),
    "a table": ("members", np.zeros((10, 1), np.int32)),
    "one number": ("indptr", np.int64(3)),
    "none": ("indptr", np.zeros(0, np.int64)),
}


def forget_content(folder: Path) -> None:
    """An attacker's description has no digests, or fitting ones."""
    edit_description(folder / "clusters.json", "content")


@pytest.mark.parametrize("case", ARRAYS)
def test_members_as_arrays(case: str, tmp_path: Path) -> None:
    save_clusters(str(tmp_path / "c"), Clusters.from_assignment(np.arange(10) % 2), {})
    name, array = ARRAYS[case]
    np.save(tmp_path / "c" / f"{name}.npy", array)
    forget_content(tmp_path / "c")
    assert "/c" in sentence(load_clusters, str(tmp_path / "c"), 10)


OUTSIDE = [case for case, (_, array) in ARRAYS.items() if array.dtype.kind == "i" and array.ndim == 1 and len(array)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("case", OUTSIDE)
def test_large_members_are_checked_where_they_are_used(
    case: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays that are too large to be read on opening, with digests that fit: nothing outside is ever read."""
    monkeypatch.setattr("fairseq.retrieval.clusters.members.CHECKED_ENTRIES", 0)
    monkeypatch.setattr("fairseq.retrieval.kernels.AVAILABLE", compiled and kernels.AVAILABLE)
    clusters = Clusters.from_assignment(np.arange(10) % 2)
    name, array = ARRAYS[case]
    setattr(clusters, name, array)
    save_clusters(str(tmp_path / "c"), clusters, {})

    def use() -> None:
        automaton = Automaton(10, 64, load_clusters(str(tmp_path / "c"), 10))
        for entry in range(10):
            automaton.expand(Entries(torch.zeros(1, dtype=torch.int64), torch.tensor([entry])), 1)

    assert "/c" in sentence(use)


def test_members_that_would_be_unpickled(tmp_path: Path) -> None:
    save_clusters(str(tmp_path / "c"), Clusters.from_assignment(np.arange(10) % 2), {})
    np.save(tmp_path / "c" / "members.npy", np.array([print], dtype=object), allow_pickle=True)
    forget_content(tmp_path / "c")
    assert "cannot be opened" in sentence(load_clusters, str(tmp_path / "c"), 10)


def test_an_array_header_that_announces_more_than_the_file(tmp_path: Path) -> None:
    save_clusters(str(tmp_path / "c"), Clusters.from_assignment(np.arange(10) % 2), {})
    path = tmp_path / "c" / "members.npy"
    path.write_bytes(path.read_bytes().replace(b"(10,)", b"(9999999999999,)"[:5]).replace(b"(10,)", b"(99,)"))
    forget_content(tmp_path / "c")
    assert "/c" in sentence(load_clusters, str(tmp_path / "c"), 10)


@pytest.fixture(scope="module")
def ivfpq() -> bytes:
    keys = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(8), 8, 4, 2, 8)
    index.train(keys)
    index.add(keys)
    return faiss.serialize_index(index).tobytes()


def read_and_search(path: str) -> Any:
    index = FaissIndex(path, 300, probe=4)
    queries = torch.ones(2, 8)
    return index.search(queries, 5), index.distances(queries, torch.tensor([0, 1]), torch.tensor([0, 299]))


@pytest.mark.parametrize("number", [1 << 28, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_indexes_with_hostile_sizes(number: int, ivfpq: bytes, tmp_path: Path) -> None:
    """Every eight bytes of the head in turn are replaced by a size: nothing is read, or everything is right."""
    path = tmp_path / "x.index"

    def all_heads() -> list[str]:
        from fairseq.errors import UserError

        outcomes = []
        for offset in range(4, 140, 4):
            raw = bytearray(ivfpq)
            struct.pack_into("<Q", raw, offset, number)
            path.write_bytes(raw)
            try:
                read_and_search(str(path))
                outcomes.append("read")
            except UserError as error:
                outcomes.append("refused" if "\n" not in str(error) else str(error))
        return outcomes

    outcomes = bounded(all_heads)
    assert set(outcomes) <= {"read", "refused"}
    assert outcomes.count("refused") > 10


def test_ids_of_an_index_outside_the_datastore(ivfpq: bytes, tmp_path: Path) -> None:
    index = faiss.deserialize_index(np.frombuffer(ivfpq, np.uint8))
    index.reset()
    index.add_with_ids(np.ones((3, 8), np.float32), np.array([1, 2, 10**12]))
    faiss.write_index(index, str(tmp_path / "x.index"))
    assert "x.index: found entries" in sentence(read_and_search, str(tmp_path / "x.index"))


def test_lists_on_disk_that_lie_outside_their_file(ivfpq: bytes, tmp_path: Path) -> None:
    index = faiss.deserialize_index(np.frombuffer(ivfpq, np.uint8))
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(tmp_path / "x.ivfdata"))
    lists.merge_from_1(index.invlists)
    index.replace_invlists(lists)
    faiss.write_index(index, str(tmp_path / "x.index"))
    assert bounded(read_and_search, str(tmp_path / "x.index"))
    with open(tmp_path / "x.ivfdata", "r+b") as stream:
        stream.truncate(100)
    assert "x.ivfdata: found 100 bytes" in sentence(read_and_search, str(tmp_path / "x.index"))
    (tmp_path / "x.ivfdata").unlink()
    assert "/x." in sentence(read_and_search, str(tmp_path / "x.index"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and flags


def other_shape(state: dict[str, Any]) -> None:
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name].repeat_interleave(2, 0)


def other_kind(state: dict[str, Any]) -> None:
    state["model"] = dict.fromkeys(state["model"], "tensor")


def none_at_all(state: dict[str, Any]) -> None:
    state["model"] = {}


def huge_width(state: dict[str, Any]) -> None:
    state["args"].decoder_embed_dim = state["args"].decoder_input_dim = state["args"].decoder_output_dim = 1 << 40


def many_layers(state: dict[str, Any]) -> None:
    state["args"].decoder_layers = 10**9


def text_for_number(state: dict[str, Any]) -> None:
    state["args"].decoder_ffn_embed_dim = "wide"


def code_for_option(state: dict[str, Any]) -> None:
    state["args"].adaptive_softmax_cutoff = "__import__('os').mkdir('CANARY')"


def integers(state: dict[str, Any]) -> None:
    name = next(name for name in state["model"] if name.endswith("weight"))
    state["model"][name] = (state["model"][name] * 100).int()


def truth_values(state: dict[str, Any]) -> None:
    name = next(name for name in state["model"] if name.endswith("weight"))
    state["model"][name] = state["model"][name] > 0


STATES = [integers, truth_values, other_shape, other_kind, none_at_all]
STATES += [huge_width, many_layers, text_for_number, code_for_option]


@pytest.mark.parametrize("change", STATES)
def test_checkpoints_of_other_models(
    change: Callable[[dict[str, Any]], None], golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = checkpoint_utils.read_torch_file(golden / "checkpoints" / "checkpoint_best.pt")
    state["args"].data = str(golden / "data-bin")
    change(state)
    torch.save(state, tmp_path / "m.pt")
    said = sentence(checkpoint_utils.load_model_ensemble, [str(tmp_path / "m.pt")], memory=1 << 30)
    assert "m.pt: " in said or said.startswith("--")
    assert not (tmp_path / "CANARY").exists()


def test_parameters_of_another_type_are_the_models(golden: Path, tmp_path: Path) -> None:
    """Half and double precision are converted; what would be cut to integers is not silently a model."""
    state = checkpoint_utils.read_torch_file(golden / "checkpoints" / "checkpoint_best.pt")
    state["args"].data = str(golden / "data-bin")
    state["model"] = {name: value.double() for name, value in state["model"].items()}
    torch.save(state, tmp_path / "m.pt")
    models, _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "m.pt")])
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}


OVERRIDES = [
    "__import__('os').system('touch CANARY')",
    "{'data': open('CANARY', 'w')}",
    "{'data': (lambda: 1)()}",
    "{**{}, 'a': [x for x in ()]}",
    "(" * 5000,
    "{'a':" * 3000,
    "9" * 10000,
    "[1]",
    "{1, 2}",
]


@pytest.mark.parametrize("text", OVERRIDES, ids=range(len(OVERRIDES)))
def test_overrides_are_literals(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--model-overrides: found"):
        literal_dict("--model-overrides", text)
    assert not (tmp_path / "CANARY").exists()
