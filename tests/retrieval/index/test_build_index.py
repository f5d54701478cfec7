"""Building an index of the golden keys, continuing an earlier build, and files that a build never replaces."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from fairseq.errors import BadFlag
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import build_index
from fairseq.retrieval.index.build_index import IndexBuilder, IndexRecipe

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden"


@pytest.mark.parametrize("first", [False, True])
def test_another_preset_is_trained_anew(first: bool, tmp_path: Path) -> None:
    """Neither preset takes what the other one has trained."""
    keys = np.random.default_rng(0).standard_normal((900, 8)).astype(np.float16)
    keys.tofile(tmp_path / "d_keys.npy")
    np.zeros(900, "<i8").tofile(tmp_path / "d_vals.npy")
    datastore = Datastore.open(str(tmp_path / "d"), 900, 8, True)
    for fast in (first, not first):
        IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(8, 2, 4, 1, fast=fast), 900, 300).build(False)
    alone = IndexRecipe(8, 2, 4, 1, fast=not first)
    IndexBuilder(datastore, str(tmp_path / "alone"), alone, 900, 300).build(False)
    assert (tmp_path / "i").read_bytes() == (tmp_path / "alone").read_bytes()
    assert (tmp_path / "i.trained").read_bytes() == (tmp_path / "alone.trained").read_bytes()


def test_another_probe_needs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).standard_normal((900, 8)).astype(np.float16)
    keys.tofile(tmp_path / "d_keys.npy")
    np.zeros(900, "<i8").tofile(tmp_path / "d_vals.npy")
    datastore = Datastore.open(str(tmp_path / "d"), 900, 8, True)
    IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(8, 2, 4, 1), 900, 300).build(False)
    monkeypatch.setattr(IndexBuilder, "_new_index", None)
    index = IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(8, 2, 7, 1), 900, 300).build(False)
    assert index.nprobe == 7


def test_too_few_keys_for_so_many_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.random.default_rng(0).standard_normal((900, 8)).astype(np.float16).tofile(tmp_path / "d_keys.npy")
    np.zeros(900, "<i8").tofile(tmp_path / "d_vals.npy")
    datastore = Datastore.open(str(tmp_path / "d"), 900, 8, True)
    IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(23, 2, 4, 1), 900, 300).build(False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(100, 2, 4, 1), 900, 300).build(False)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[-1] == (
        "--ncentroids 100: 9.0 training keys a list, fewer than FAISS asks for (39); 23 lists would have them"
    )


@pytest.mark.parametrize("name", ["d_keys.npy", "d_vals.npy", "other.txt"])
def test_nothing_but_an_index_is_replaced(name: str, tmp_path: Path) -> None:
    np.ones((90, 8), np.float16).tofile(tmp_path / "d_keys.npy")
    np.zeros(90, "<i8").tofile(tmp_path / "d_vals.npy")
    (tmp_path / "other.txt").write_text("precious")
    before = (tmp_path / name).read_bytes()
    datastore = Datastore.open(str(tmp_path / "d"), 90, 8, True)
    with pytest.raises(BadFlag, match="--faiss_index: found .*, which"):
        IndexBuilder(datastore, str(tmp_path / name), IndexRecipe(8, 2, 4, 1), 90, 300)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.skipif("AVX" not in faiss.get_compile_options(), reason="FAISS has no AVX2 here")
def test_golden_index_to_the_byte(run_cli: Any, tmp_path: Path) -> None:
    """By the command that the original was run with. FAISS's sums are alike with AVX2 and AVX-512 for these keys."""
    (command,) = (
        line for line in json.loads((GOLDEN / "MANIFEST.json").read_text())["build_commands"] if "build_dstore" in line
    )
    words = shlex.split(command[command.index("$RETO/build_dstore.py") :])[1:]
    words[words.index("--faiss_index") + 1] = str(tmp_path / "knn.index")
    assert run_cli("build_dstore", words, cwd=GOLDEN).status == 0
    assert (tmp_path / "knn.index").read_bytes() == (GOLDEN / "checkpoints" / "knn16.index").read_bytes()


@pytest.mark.parametrize("most", [70, 1000])
def test_training_sample_is_the_original_one(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same keys in the same order as numpy's global generator draws them."""
    keys = np.arange(900 * 8, dtype=np.float32).reshape(900, 8)
    keys.tofile(tmp_path / "d_keys.npy")
    np.zeros(900, "<i8").tofile(tmp_path / "d_vals.npy")
    datastore = Datastore.open(str(tmp_path / "d"), 900, 8, False)
    monkeypatch.setattr(build_index, "TRAINING_SAMPLE", most)
    sample = IndexBuilder(datastore, str(tmp_path / "i"), IndexRecipe(4, 2, 4, 5), 900, 33)._training_sample()
    np.random.seed(5)
    np.testing.assert_array_equal(sample, keys[np.random.choice(np.arange(900), [min(most, 900)], replace=False)])
