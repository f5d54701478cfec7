"""Binarised text in every format and element type, written by hand and evaluated to one loss on the command line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# code in .idx -> type; 6 and 7 are both double precision (6 was Python's float)
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f8", 8: "<u2", 9: "<u4", 10: "<u8"}


@pytest.fixture(name="shared", scope="module")
def shared_fixture(make_world: Any, by_hand: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(world, checkpoint, its loss on the uint16 mmap split)."""
    world = make_world(tmp_path_factory.mktemp("data"))
    checkpoint = world.save("plain.pt", by_hand.older(by_hand.plain_state()))
    return world, checkpoint, world.loss(checkpoint, "--context-window", 8)


def data_folder(tmp_path: Path, by_hand: Any) -> Path:
    (tmp_path / "dict.txt").write_text(by_hand.dictionary_text())
    return tmp_path / "valid"


def write_legacy(prefix: Path, lines: list[list[int]], code: int, dtype: str) -> None:
    """The TorchNet layout, field by field: ids plus one, offsets in elements."""
    tokens = np.concatenate([np.array(line) for line in lines]) + 1
    prefix.with_suffix(".bin").write_bytes(tokens.astype(dtype).tobytes())
    lengths = [len(line) for line in lines]
    index = b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, code, np.dtype(dtype).itemsize)
    index += struct.pack("<QQ", len(lines), len(lines))
    index += struct.pack(f"<{len(lines) + 1}q", *range(len(lines) + 1))
    index += struct.pack(f"<{len(lines) + 1}q", *np.cumsum([0, *lengths]).tolist())
    index += struct.pack(f"<{len(lines)}q", *lengths)
    prefix.with_suffix(".idx").write_bytes(index)


def check(shared: Any, data: Path, *flags: str) -> None:
    world, checkpoint, wanted = shared
    found, log = world.evaluate(checkpoint, "--context-window", 8, *flags, data=data)
    assert found["loss_base2"] == pytest.approx(wanted, abs=1e-9)
    assert f"loaded 20 examples from: {data}/valid" in log


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("flags", [(), ("--dataset-impl", "mmap")], ids=["found", "told"])
def test_mmap(shared: Any, by_hand: Any, tmp_path: Path, code: int, flags: tuple[str, ...]) -> None:
    prefix = data_folder(tmp_path, by_hand)
    by_hand.write_mmap(prefix, by_hand.text_lines(2, 20), code, TYPES[code])
    assert prefix.with_suffix(".idx").stat().st_size == 26 + 12 * 20
    check(shared, tmp_path, *flags)


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("flags", [(), ("--dataset-impl", "lazy"), ("--dataset-impl", "cached")], ids=str)
def test_legacy(shared: Any, by_hand: Any, tmp_path: Path, code: int, flags: tuple[str, ...]) -> None:
    write_legacy(data_folder(tmp_path, by_hand), by_hand.text_lines(2, 20), code, TYPES[code])
    check(shared, tmp_path, *flags)


@pytest.mark.parametrize("flags", [(), ("--dataset-impl", "raw")], ids=["found", "told"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_raw(shared: Any, by_hand: Any, tmp_path: Path, flags: tuple[str, ...], newline: str) -> None:
    """A text file named like the split; words are looked up, an eos ends each line."""
    text = data_folder(tmp_path, by_hand)
    lines = [" ".join(f"w{token - 4}" for token in line[:-1]) + newline for line in by_hand.text_lines(2, 20)]
    text.write_bytes("".join(lines).encode())
    check(shared, tmp_path, *flags)


@pytest.mark.parametrize(("impl", "told"), [("mmap", "cached"), ("mmap", "lazy"), ("legacy", "mmap")])
def test_the_wrong_format_is_one_sentence(shared: Any, by_hand: Any, tmp_path: Path, impl: str, told: str) -> None:
    world, checkpoint, _ = shared
    prefix = data_folder(tmp_path, by_hand)
    if impl == "mmap":
        by_hand.write_mmap(prefix, by_hand.text_lines(2, 20))
    else:
        write_legacy(prefix, by_hand.text_lines(2, 20), 4, "<i4")
    command = [tmp_path, "--path", checkpoint, "--cpu", "--gen-subset", "valid", "--dataset-impl", told]
    error = world.run("eval_lm", command).error
    assert "valid.idx: found a header starting" in error
    assert "--dataset-impl" in error


def test_dictionaries_of_other_writers(shared: Any, by_hand: Any, tmp_path: Path) -> None:
    """No newline at the end, carriage returns, and the newer flag for repeated words."""
    prefix = data_folder(tmp_path, by_hand)
    by_hand.write_mmap(prefix, by_hand.text_lines(2, 20))
    text = by_hand.dictionary_text()
    (tmp_path / "dict.txt").write_bytes(text.replace("\n", "\r\n").rstrip().encode())
    check(shared, tmp_path)
    (tmp_path / "dict.txt").write_text(text.replace("w95 5\n", "w3 5 #fairseq:overwrite\n"))
    check(shared, tmp_path)
