"""Artefacts that do not belong together are refused, and both are named; --force continues, and the results record
it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

LM = "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode none --max-tokens 128 --context-window 64"
SAVE = "--save-knnlm-dstore --dstore-fp16 --no-progress-bar"
BUILD = "--ncentroids 8 --code_size 4 --no-progress-bar"
USE = "--knnlm --k 16 --lmbda 0.25 --knn-sim-func do_not_recomp_l2 --no-load-keys --no-progress-bar"


@pytest.fixture(scope="module")
def pair(golden: Path, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datastores of equal size, `a` and `b`, each with its index and clusters."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(golden / "data-bin", folder / "data-bin")
    shutil.copytree(golden / "checkpoints", folder / "checkpoints")
    for name, subset in (("a", "valid"), ("b", "test")):
        for command, flags in (
            ("eval_lm", f"{LM} --gen-subset {subset} {SAVE} --dstore-mmap {name} --dstore-size 3000"),
            ("build_dstore", f"--dstore_mmap {name} --faiss_index {name}.index {BUILD} --actual_dstore_size 3000"),
            ("kmeans", f"--dstore {name} --num-clusters 4 --sample 900 --save {name} --iterations 2 --no-progress-bar"),
        ):
            done = run_cli(command, flags.split(), cwd=folder)
            assert done.status == 0, done.stderr
    return folder


def use(folder: Path, run_cli: Any, flags: str) -> Any:
    return run_cli("eval_lm", f"{LM} {USE} --gen-subset valid {flags}".split(), cwd=folder)


def test_what_belongs_together(pair: Path, run_cli: Any) -> None:
    for members in ("a_s900_k4_members.pkl", "a_s900_k4_clusters"):
        done = use(pair, run_cli, f"--dstore-filename a --indexfile a.index --members {members}")
        assert done.status == 0, done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        "--dstore-filename a --indexfile b.index",
        "--dstore-filename a --indexfile a.index --members b_s900_k4_members.pkl",
        "--dstore-filename a --indexfile a.index --members b_s900_k4_clusters",
    ],
)
def test_parts_of_two_datastores(flags: str, pair: Path, run_cli: Any, tmp_path: Path) -> None:
    error = use(pair, run_cli, flags).error
    assert "which was made from a datastore with" in error and "expected one of a, whose" in error
    assert "--indexfile: found b.index" in error or "--members: found b_s900" in error
    results = tmp_path / "r.json"
    done = use(pair, run_cli, f"{flags} --force --results-json {results}")
    assert done.status == 0, done.stderr
    assert "--force: continuing although" in done.stderr
    assert any("was made from a datastore with" in sentence for sentence in json.loads(results.read_text())["forced"])


def test_another_model(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    state = torch.load(pair / "checkpoints" / "checkpoint_best.pt", weights_only=False)
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name] * 1.01
    torch.save(state, tmp_path / "other.pt")
    flags = f"{LM} {USE} --gen-subset valid --dstore-filename a --indexfile a.index"
    other = flags.replace("checkpoints/checkpoint_best.pt", str(tmp_path / "other.pt")).split()
    error = run_cli("eval_lm", other, cwd=pair).error
    assert error.startswith("eval_lm.py: error: --dstore-filename: found a, saved with the weights ")
    assert "other.pt" in error

    alone = " ".join(other).split(" --knnlm")[0].split()  # the model without a datastore
    scores = ["--gen-subset", "valid", "--no-progress-bar", "--save-scores", tmp_path / "scores"]
    assert run_cli("eval_lm", [*alone, *scores], cwd=pair).status == 0
    sweep = f"--scores {tmp_path}/scores --output {tmp_path}/out --dstore-filename a --indexfile a.index --k 16"
    sweep += " --knn-sim-func do_not_recomp_l2 --no-load-keys --no-progress-bar"
    error = run_cli("sweep", sweep.split(), cwd=pair).error
    assert "--dstore-filename: found a, saved with the weights " in error and f"of {tmp_path}/scores" in error
    assert not list(tmp_path.glob("out*"))
    assert run_cli("sweep", [*sweep.split(), "--force"], cwd=pair).status == 0


def test_the_same_weights_in_another_file(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    """A checkpoint without its optimiser, or in the legacy container, is the same model."""
    state = torch.load(pair / "checkpoints" / "checkpoint_best.pt", weights_only=False)
    state.pop("last_optimizer_state", None)
    torch.save(state, tmp_path / "lean.pt", _use_new_zipfile_serialization=False)
    flags = f"{LM} {USE} --gen-subset valid --dstore-filename a --indexfile a.index"
    lean = flags.replace("checkpoints/checkpoint_best.pt", str(tmp_path / "lean.pt")).split()
    done = run_cli("eval_lm", lean, cwd=pair)
    assert done.status == 0, done.stderr


def test_another_dictionary(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    shutil.copytree(pair / "data-bin", tmp_path / "data-bin")
    lines = (tmp_path / "data-bin" / "dict.txt").read_text().splitlines()
    lines[10], lines[11] = lines[11], lines[10]
    (tmp_path / "data-bin" / "dict.txt").write_text("\n".join(lines) + "\n")
    flags = f"{LM} {USE} --gen-subset valid --dstore-filename a --indexfile a.index"
    error = run_cli("eval_lm", flags.replace("data-bin", str(tmp_path / "data-bin"), 1).split(), cwd=pair).error
    assert "saved with the dictionary" in error and str(tmp_path / "data-bin" / "dict.txt") in error


def test_downloads_without_descriptions(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    for name in ("a_keys.npy", "a_vals.npy", "a.index", "a_s900_k4_members.pkl"):
        shutil.copyfile(pair / name, tmp_path / name)
    flags = f"--dstore-filename {tmp_path}/a --indexfile {tmp_path}/a.index --members {tmp_path}/a_s900_k4_members.pkl"
    done = use(pair, run_cli, f"{flags} --dstore-size 3000 --dstore-fp16")
    assert done.status == 0, done.stderr


def test_a_trained_index_of_another_datastore_is_not_used(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    """The same --faiss_index for two datastores: the second build trains again."""
    for name in ("a", "b"):
        flags = f"--dstore_mmap {name} --faiss_index {tmp_path}/i {BUILD} --actual_dstore_size 3000"
        done = run_cli("build_dstore", flags.split(), cwd=pair)
        assert done.status == 0, done.stderr
    assert "was trained for another datastore or recipe; training again" in done.stderr
    assert (tmp_path / "i").read_bytes() == (pair / "b.index").read_bytes()


def test_counts_are_said_and_checked(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    done = run_cli("eval_lm", f"{LM} --gen-subset valid --no-progress-bar --results-json {results}".split(), cwd=pair)
    content = json.loads(results.read_text())
    words = np.fromfile(pair / "data-bin" / "valid.bin", np.uint16)
    assert content["count"] == content["scored_tokens"] == len(words) and content["skipped_samples"] == 0
    assert content["forced"] == [] and content["unit"] == "token" and content["context_window"] == 64
    assert f"scored {len(words)} tokens, counted per token ({len(words)}); samples of up to" in done.stderr


def test_text_with_the_padding_symbol(pair: Path, run_cli: Any, tmp_path: Path) -> None:
    """Its targets would silently be left out of the count."""
    shutil.copytree(pair / "data-bin", tmp_path / "data-bin")
    words = np.fromfile(tmp_path / "data-bin" / "valid.bin", np.uint16)
    words[100] = 1
    words.tofile(tmp_path / "data-bin" / "valid.bin")
    flags = f"{LM} --gen-subset valid --no-progress-bar".replace("data-bin", str(tmp_path / "data-bin"), 1)
    flags = flags.replace("--context-window 64", "--context-window 0")
    error = run_cli("eval_lm", flags.split(), cwd=pair).error
    assert f"found {len(words) - 1} scored tokens, expected the {len(words)} of the samples" in error
