"""The doctor with a Hugging Face model: it finds a datastore of another model, of another tokenizer and of another type
of key, by the datastore's sidecar and, where there is none, by the keys and values themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq.evaluation.datastore_checks import OK, WRONG
from tests.huggingface.conftest import GOLDEN_HF

GPT2 = GOLDEN_HF / "gpt2"
WINDOWS = "--max-length 128 --stride 64 --drop-remainder --group-documents 1000"
BLOCKS = "--context-window 32 --tokens-per-sample 96"
RETRIEVAL = "--knnlm --k 64 --probe 8 --lmbda 0.1 --knn-sim-func do_not_recomp_l2 --no-pointer"


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.0.mlp.c_fc.weight"] *= 1.2
    path.unlink()
    save_file(weights, path, {"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    """As many tokens, two of which have exchanged their numbers."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["Ġthe"] = vocabulary["Ġthe"], vocabulary["e"]
    path.unlink()
    path.write_text(json.dumps(content))


def the_same(folder: Path) -> None:
    """Nothing is changed."""


CHANGES = {"the same": the_same, "weights": other_weights, "tokenizer": other_tokenizer, "key type": the_same}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, binarised: Any) -> dict[str, tuple[Path, Path]]:
    """By what is another one in it: (the text by the model's tokenizer, the model's folder)."""
    made = {}
    for name, change in CHANGES.items():
        folder = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        shutil.copytree(GPT2, folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("dstore*", "clus*"))
        change(folder)
        made[name] = (binarised(folder if change is other_tokenizer else GPT2), folder)
    return made


@pytest.fixture(scope="module")
def saved(binarised: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A datastore with its index for each way of cutting the text."""
    made = {}
    for how in (BLOCKS, WINDOWS):
        store = tmp_path_factory.mktemp("saved") / "d"
        flags = f"--gen-subset train --save-knnlm-dstore --dstore-fp16 --no-progress-bar --cpu {how}".split()
        done = run_cli("eval_lm", [binarised(GPT2), "--path", GPT2, "--dstore-mmap", store, *flags])
        assert done.status == 0, done.stderr
        build = ["--dstore_mmap", store, "--faiss_index", f"{store}.index", "--ncentroids", 16, "--code_size", 8]
        assert run_cli("build_dstore", [*build, "--no-progress-bar"]).status == 0
        made[how] = store
    return made


def doctor(run_cli: Any, data: Path, model: Path, *flags: Any) -> tuple[int, list[str]]:
    """Its exit status, and what it says, a line a finding."""
    common = f"--gen-subset valid --no-progress-bar --cpu {RETRIEVAL}".split()
    done = run_cli("doctor", [data, "--path", model, *common, *flags])
    lines = [line.split(" | ", 3) for line in done.stderr.splitlines()]
    return done.status, [parts[3] for parts in lines if len(parts) == 4 and parts[2] == "fairseq_cli.doctor"]


def asked_for(name: str) -> list[str]:
    return ["--knn-keytype", "final_hidden"] if name == "key type" else []


@pytest.mark.parametrize("saved_in, evaluated_in", [(BLOCKS, WINDOWS), (WINDOWS, BLOCKS)])
def test_a_right_datastore(run_cli: Any, models: Any, saved: Any, saved_in: str, evaluated_in: str) -> None:
    """However the text is cut now, keys are made again as they were saved."""
    store = saved[saved_in]
    files = ["--dstore-filename", store, "--indexfile", f"{store}.index"]
    status, said = doctor(run_cli, *models["the same"], *files, *evaluated_in.split())
    assert status == 0, "\n".join(said)
    for part in ("compared: weights, dictionary, vocabulary, key type", "the model reproduces"):
        assert any(line.startswith(f"{OK}: ") and part in line for line in said), said


@pytest.mark.parametrize("name, word", [("weights", "weights"), ("tokenizer", "dictionary"), ("key type", "key type")])
def test_a_datastore_of_another_by_its_sidecar(run_cli: Any, models: Any, saved: Any, name: str, word: str) -> None:
    store = saved[BLOCKS]
    files = ["--dstore-filename", store, "--indexfile", f"{store}.index"]
    status, said = doctor(run_cli, *models[name], *files, *BLOCKS.split(), *asked_for(name))
    assert status == 1
    assert any(line.startswith(f"{WRONG}: --dstore-filename") and f"the {word} " in line for line in said), said


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("the same", f"{OK}: the model reproduces"),
        ("weights", f"{WRONG}: the model does not reproduce"),
        ("tokenizer", "the stored values are not"),
        ("key type", f"{WRONG}: the model does not reproduce"),
    ],
)
def test_a_datastore_of_another_without_sidecar(run_cli: Any, models: Any, name: str, sentence: str) -> None:
    """The files of knn-transformers, which nothing describes."""
    flags = ["--dstore-dir", GPT2 / "dstore", *WINDOWS.split(), *asked_for(name)]
    status, said = doctor(run_cli, *models[name], *flags)
    assert any(sentence in line for line in said), said
    assert any("no sidecar" in line for line in said)
    assert status == (1 if WRONG in sentence else 0), said
