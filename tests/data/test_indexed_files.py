"""The binary formats: bytes as specified, every element type, both generations, and files that are not whole."""

import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq import refusals
from fairseq.data import ConcatDataset, Dictionary, MMapIndexedDataset, data_utils, indexed_dataset
from fairseq.data.indexed_dataset import (
    IndexedCachedDataset,
    IndexedDataset,
    IndexedDatasetBuilder,
    MMapIndexedDatasetBuilder,
    make_builder,
    make_dataset,
)
from fairseq.errors import BadFile, BadFlag, MissingFile, UserError

ITEMS = [[4, 5, 2], [2], [4, 6, 2]]
IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 03000000 01000000 03000000"
    "0000000000000000 0600000000000000 0800000000000000".replace(" ", "")
)


def write(prefix, items, impl="mmap", vocab_size=100):
    builder = make_builder(f"{prefix}.bin", impl, vocab_size)
    for item in items:
        builder.add_item(torch.tensor(item, dtype=torch.int32))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def lists(dataset):
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_mmap_bytes(tmp_path):
    write(tmp_path / "x", ITEMS)
    assert (tmp_path / "x.bin").read_bytes() == bytes.fromhex("0400050002000200040006000200")
    assert (tmp_path / "x.idx").read_bytes() == IDX
    assert len(IDX) == 62
    dataset = MMapIndexedDataset(str(tmp_path / "x"))
    assert lists(dataset) == ITEMS
    assert dataset[0].dtype == torch.int64
    assert dataset.tokens.tolist() == sum(ITEMS, [])
    assert dataset.sizes.tolist() == [3, 1, 3]
    assert dataset.contiguous
    assert dataset.get(2, offset=1).tolist() == [6, 2]
    assert lists(pickle.loads(pickle.dumps(dataset))) == ITEMS
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("vocab_size, dtype", [(65499, np.uint16), (65500, np.int32), (None, np.int32)])
def test_element_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    path = write(tmp_path / "x", ITEMS, vocab_size=vocab_size)
    assert MMapIndexedDataset(path).dtype == dtype


@pytest.mark.parametrize("code", sorted(indexed_dataset.dtypes))
def test_every_element_type_is_read(tmp_path, code):
    dtype = np.dtype(indexed_dataset.dtypes[code])
    values = [[1, 2, 100], [], [7]]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, 3)
    offsets = [0, 3 * dtype.itemsize, 3 * dtype.itemsize]
    (tmp_path / "x.idx").write_bytes(header + struct.pack("<3i3q", 3, 0, 1, *offsets))
    (tmp_path / "x.bin").write_bytes(np.array(sum(values, []), dtype).tobytes())
    dataset = MMapIndexedDataset(str(tmp_path / "x"))
    assert lists(dataset) == values
    assert dataset[0].dtype == (torch.float64 if dtype.kind == "f" else torch.int64)
    assert indexed_dataset.dtypes[indexed_dataset.code(dtype)] == indexed_dataset.dtypes[code]


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=8),
    impl=st.sampled_from(["mmap", "lazy", "cached"]),
    at_once=st.booleans(),
)
def test_round_trip(tmp_path_factory, items, impl, at_once):
    prefix = tmp_path_factory.mktemp("data") / "x"
    builder = make_builder(f"{prefix}.bin", impl, 100)
    if at_once:
        builder.add_items(np.array(sum(items, []), dtype=np.int32), np.array([len(item) for item in items], np.int32))
    else:
        for item in items:
            builder.add_item(torch.tensor(item, dtype=torch.int64))
    builder.finalize(f"{prefix}.idx")
    assert indexed_dataset.infer_dataset_impl(str(prefix)) == ("mmap" if impl == "mmap" else "cached")
    dataset = make_dataset(str(prefix), impl, fix_lua_indexing=True)
    assert lists(dataset) == items
    assert dataset.sizes.tolist() == [len(item) for item in items]
    if impl == "cached" and items:
        wanted = list(range(0, len(items), 2))
        dataset.prefetch(wanted)
        assert dataset.cache.size == sum(len(items[i]) for i in wanted)
        assert lists(dataset) == items


def test_legacy_bytes(tmp_path):
    write(tmp_path / "x", ITEMS, "cached")
    stored = np.frombuffer((tmp_path / "x.bin").read_bytes(), "<i4")
    assert stored.tolist() == [token + 1 for item in ITEMS for token in item]
    header = b"TNTIDX\0\0" + struct.pack("<5Q", 1, 4, 4, 3, 3)
    columns = struct.pack("<11q", 0, 1, 2, 3, 0, 3, 4, 7, 3, 1, 3)
    assert (tmp_path / "x.idx").read_bytes() == header + columns
    assert lists(IndexedDataset(str(tmp_path / "x"))) == [[t + 1 for t in item] for item in ITEMS]
    lazy = IndexedDataset(str(tmp_path / "x"), fix_lua_indexing=True)
    lazy[0]
    assert lists(pickle.loads(pickle.dumps(lazy))) == ITEMS


def test_legacy_items_keep_their_shape(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"))
    builder.add_item(torch.arange(6).reshape(2, 3))
    builder.add_item(torch.arange(2))
    builder.finalize(str(tmp_path / "x.idx"))
    dataset = IndexedCachedDataset(str(tmp_path / "x"), fix_lua_indexing=True)
    assert dataset[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert dataset[1].tolist() == [0, 1]
    assert dataset.sizes.tolist() == [6, 2]


@pytest.mark.parametrize("impl", ["mmap", "cached"])
def test_merged_parts_equal_one_file(tmp_path, impl):
    write(tmp_path / "one", ITEMS, impl)
    write(tmp_path / "part", ITEMS[1:], impl)
    builder = make_builder(str(tmp_path / "merged.bin"), impl, 100)
    builder.add_item(torch.tensor(ITEMS[0]))
    builder.merge_file_(str(tmp_path / "part"))
    builder.finalize(str(tmp_path / "merged.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / ("merged" + suffix)).read_bytes() == (tmp_path / ("one" + suffix)).read_bytes()


@pytest.mark.parametrize("impl", ["mmap", "cached"])
def test_nothing_appears_until_whole(tmp_path, impl):
    write(tmp_path / "x", ITEMS, impl)
    before = (tmp_path / "x.bin").read_bytes()
    builder = make_builder(str(tmp_path / "x.bin"), impl, 100)
    builder.add_item(torch.tensor([9]))
    assert (tmp_path / "x.bin").read_bytes() == before
    builder.abandon()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert (tmp_path / "x.bin").read_bytes() == before


def test_values_that_do_not_fit_are_refused(tmp_path):
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    with pytest.raises(UserError, match="65536 do not fit uint16"):
        builder.add_item(torch.tensor([65536]))
    builder.abandon()
    with pytest.raises(BadFlag, match="--dataset-impl: found raw"):
        make_builder(str(tmp_path / "x.bin"), "raw")


@pytest.mark.parametrize(
    "name, damage, sentence",
    [
        ("x.bin", lambda b: b[:-2], r"x.bin: found 12 bytes, expected more, as .*x.idx says; .*incomplete"),
        ("x.idx", lambda b: b[:-1], r"x.idx: found 61 bytes, expected 62 bytes for the 3 items"),
        ("x.idx", lambda b: b[:20], r"x.idx: found a header starting"),
        ("x.idx", lambda b: b"XX" + b[2:], r"x.idx: found a header starting b'XXIDIDX.*--dataset-impl"),
        ("x.idx", lambda b: b[:9] + b"\x02" + b[10:], r"found version 2, expected version 1"),
        ("x.idx", lambda b: b[:17] + b"\x0b" + b[18:], r"found element type code 11"),
        ("x.idx", lambda b: b[:26] + b"\xff" * 4 + b[30:], r"a negative length or offset"),
        ("x.idx", lambda b: b[:-8] + struct.pack("<q", 1 << 40), r"x.bin: found 14 bytes, expected more, as"),
        ("x.idx", lambda b: b[:18] + b"\xff" * 8 + b[26:], r"x.idx: found 62 bytes"),
    ],
)
def test_damaged_mmap_files_are_one_sentence(tmp_path, name, damage, sentence):
    write(tmp_path / "x", ITEMS)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(BadFile, match=sentence):
        MMapIndexedDataset(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "name, damage, sentence",
    [
        ("x.bin", lambda b: b[:-4], r"x.bin: found 24 bytes, expected 28"),
        ("x.idx", lambda b: b[:-8], r"x.idx: found version 1, element type code 4 and 128 bytes, expected"),
        ("x.idx", lambda b: b"MM" + b[2:], r"x.idx: found a header starting"),
        ("x.idx", lambda b: b[:88] + struct.pack("<q", 9) + b[96:], r"offsets out of order"),
    ],
)
def test_damaged_legacy_files_are_one_sentence(tmp_path, name, damage, sentence):
    write(tmp_path / "x", ITEMS, "lazy")
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(BadFile, match=sentence):
        IndexedDataset(str(tmp_path / "x"))


def test_items_in_another_order_are_refused_and_respected_when_forced(tmp_path, monkeypatch):
    write(tmp_path / "x", ITEMS)
    index = (tmp_path / "x.idx").read_bytes()
    (tmp_path / "x.idx").write_bytes(index[:38] + struct.pack("<3q", 8, 6, 0))
    with pytest.raises(BadFile, match="offsets that are not the sums of the lengths"):
        MMapIndexedDataset(str(tmp_path / "x"))
    monkeypatch.setitem(refusals._state, "force", True)
    dataset = MMapIndexedDataset(str(tmp_path / "x"))
    assert not dataset.contiguous
    assert lists(dataset) == [[4, 6, 2], [2], [4, 5, 2]]


def test_loading_a_split_and_its_shards(tmp_path, caplog):
    prefix = str(tmp_path / "train")
    assert data_utils.load_indexed_dataset(prefix) is None
    write(prefix, ITEMS)
    write(prefix + "1", [[7, 2]])
    write(prefix + "3", [[8, 2]])
    with caplog.at_level("INFO"):
        combined = data_utils.load_indexed_dataset(prefix, combine=True)
    assert isinstance(combined, ConcatDataset)
    assert lists(combined) == [*ITEMS, [7, 2]]
    assert f"loaded 3 examples from: {prefix}" in caplog.messages
    assert combined.contiguous
    assert combined.sizes.tolist() == [3, 1, 3, 2]
    tokens = sum([*ITEMS, [7, 2]], [])
    for start in range(len(tokens) + 1):
        for end in range(start, len(tokens) + 1):
            assert combined.token_range(start, end).tolist() == tokens[start:end]
    assert lists(data_utils.load_indexed_dataset(prefix)) == ITEMS


def test_detection(tmp_path):
    prefix = str(tmp_path / "train")
    write(prefix, ITEMS, "lazy")
    assert lists(data_utils.load_indexed_dataset(prefix)) == ITEMS
    assert isinstance(data_utils.load_indexed_dataset(prefix), IndexedCachedDataset)
    with pytest.raises(BadFile, match="check --dataset-impl"):
        data_utils.load_indexed_dataset(prefix, dataset_impl="mmap")
    with pytest.raises(BadFlag, match="--dataset-impl: found tape"):
        make_dataset(prefix, "tape")
    (tmp_path / "train").write_text("a\n")
    dictionary = Dictionary()
    dictionary.add_symbol("a")
    assert lists(data_utils.load_indexed_dataset(prefix, dictionary)) == [[4, 2]]
    assert indexed_dataset.infer_dataset_impl(str(tmp_path / "absent")) is None
    with pytest.raises(MissingFile):
        MMapIndexedDataset(str(tmp_path / "absent"))


def test_golden_splits_hold_the_golden_text(golden):
    dictionary = Dictionary.load(golden / "data-bin" / "dict.txt")
    assert len(dictionary) == 1504
    for split in ("train", "valid", "test"):
        dataset = data_utils.load_indexed_dataset(str(golden / "data-bin" / split), dictionary)
        lines = (golden / "text" / f"wiki.{split}.tokens").read_text().splitlines()
        assert len(dataset) == len(lines)
        for item, line in zip(dataset, lines):
            assert item.tolist() == dictionary.encode_line(line, add_if_not_exist=False).tolist()
