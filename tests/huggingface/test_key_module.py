"""Keys of one module's input are not searched with another's: datastores, saved scores, unfinished datastores."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq.attached_retrieval import Retrieval
from fairseq.errors import UserError
from fairseq.files.sidecar import OWN_DIGEST
from fairseq.retrieval_lm import RetrievalLM
from tests.huggingface.conftest import GOLDEN_HF, QUIET

GPT2 = GOLDEN_HF / "gpt2"
FOUND, OTHER = "transformer.h.1.mlp", "transformer.h.0.mlp"  # the first is what is found without the flag
HOW = ["--context-window", 32, "--tokens-per-sample", 32]
SETTINGS: dict[str, Any] = {"index": "exact", "k": 16, "lmbda": 0.25}
FLAGS = ["--knnlm", "--index", "exact", "--k", 16, "--lmbda", 0.25]
MADE = {"found": [], "found and given": ["--knn-module", FOUND], "other": ["--knn-module", OTHER]}


def save(store: Path, *flags: Any) -> list[Any]:
    text = ["--path", GPT2, "--gen-subset", "valid", *QUIET, *HOW]
    return [*text, "--save-knnlm-dstore", "--dstore-mmap", store, *flags]


@pytest.fixture(scope="module")
def stores(binarised: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datastores of each way of naming the module, and one whose sidecar is older than the field."""
    folder, made = tmp_path_factory.mktemp("modules"), {}
    for name, flags in MADE.items():
        made[name] = folder / name.replace(" ", "_")
        done = run_cli("eval_lm", [binarised(GPT2), *save(made[name], *flags)])
        assert done.status == 0, done.stderr
    made["older"] = folder / "older"
    for part in ("_keys.npy", "_vals.npy"):
        shutil.copy(f"{made['other']}{part}", f"{made['older']}{part}")
    info = json.loads(Path(f"{made['other']}.json").read_text())
    del info["key_module"], info[OWN_DIGEST]
    Path(f"{made['older']}.json").write_text(json.dumps(info))
    return made


def test_the_sidecar_names_the_module(stores: dict[str, Path], binarised: Any, run_cli: Any, tmp_path: Path) -> None:
    names = {name: json.loads(Path(f"{store}.json").read_text()).get("key_module") for name, store in stores.items()}
    assert names == {"found": FOUND, "found and given": FOUND, "other": OTHER, "older": None}
    flags = ["--knn-keytype", "final_hidden", "--knn-module", OTHER]  # keys that are not its input
    assert run_cli("eval_lm", [binarised(GPT2), *save(tmp_path / "d", *flags)]).status == 0
    assert "key_module" not in json.loads((tmp_path / "d.json").read_text())


@pytest.mark.parametrize("asked", MADE)
@pytest.mark.parametrize("name", [*MADE, "older"])
def test_other_keys_are_refused(
    stores: dict[str, Path], binarised: Any, run_cli: Any, tmp_path: Path, name: str, asked: str
) -> None:
    """By the command, for saved scores, and in both ways of Python; nothing is compared with an older sidecar."""
    data, store = binarised(GPT2), stores[name]
    fits = name == "older" or (name == "other") == (asked == "other")
    had, wanted = (OTHER, FOUND) if name == "other" else (FOUND, OTHER)
    said = f"saved with the key module {had}, expected the key module {wanted} of "
    where = ["--path", GPT2, "--gen-subset", "valid", *QUIET, *HOW, *MADE[asked]]
    evaluated = run_cli("eval_lm", [data, *where, *FLAGS, "--dstore-filename", store])
    assert (evaluated.status, said in evaluated.stderr) == ((0, False) if fits else (2, True)), evaluated.stderr
    module = {"knn_module": MADE[asked][1]} if MADE[asked] else {}
    settings = {"dstore_filename": str(store), **SETTINGS, **module}

    def refused() -> Any:
        return contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"key module {had}")

    with refused():
        RetrievalLM.open(str(GPT2), str(data), cpu=True, **settings)
    from transformers import AutoModelForCausalLM

    with refused():
        Retrieval.open(**settings).attached_to(AutoModelForCausalLM.from_pretrained(GPT2).eval())


def test_force_goes_on_with_a_warning(stores: dict[str, Path], binarised: Any, run_cli: Any) -> None:
    where = ["--path", GPT2, "--gen-subset", "valid", *QUIET, *HOW, *FLAGS, "--dstore-filename", stores["other"]]
    done = run_cli("eval_lm", [binarised(GPT2), *where, "--force"])
    assert done.status == 0 and f"key module {OTHER}" in done.stderr


@pytest.mark.parametrize("name", MADE)
def test_saved_scores_know_the_module(
    stores: dict[str, Path], binarised: Any, run_cli: Any, tmp_path: Path, name: str
) -> None:
    scores = ["--path", GPT2, "--gen-subset", "valid", *QUIET, *HOW, "--save-scores", tmp_path / "s", "--save-features"]
    assert run_cli("eval_lm", [binarised(GPT2), *scores]).status == 0
    search = ["--scores", tmp_path / "s", "--dstore-filename", stores[name], "--index", "exact", "--k", 8]
    sweep = run_cli("sweep", [*search, "--lmbda", 0.1, "--output", tmp_path / "o", "--no-progress-bar"])
    gate = ["--save", tmp_path / "g.pt", "--data", binarised(GPT2), "--epochs", 1, "--no-progress-bar"]
    for done in (sweep, run_cli("adaptret", [*search, *gate])):
        expected = (2, True) if name == "other" else (0, False)
        assert (done.status, f"key module {OTHER}" in done.stderr) == expected, done.stderr


def test_a_killed_save_does_not_go_on_with_other_keys(
    binarised: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: dict[str, Path]
) -> None:
    from fairseq.retrieval.datastore.writer import DatastoreWriter

    whole, calls = DatastoreWriter.append, []

    def stop_in_the_middle(self: Any, *rows: Any) -> None:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(self, *rows)

    monkeypatch.setattr("fairseq.retrieval.datastore.writer.SAFE_POINT_SECONDS", 0.0)
    command = [binarised(GPT2), *save(tmp_path / "d"), "--max-sentences", 4]
    with monkeypatch.context() as patch:
        patch.setattr(DatastoreWriter, "append", stop_in_the_middle)
        assert run_cli("eval_lm", command).status != 0
    assert (tmp_path / "d.progress.json").exists()
    done = run_cli("eval_lm", [*command, *MADE["other"]])
    assert done.status == 0 and "continuing after" not in done.stderr, done.stderr
    assert (tmp_path / "d_keys.npy").stat().st_size == Path(f"{stores['other']}_keys.npy").stat().st_size
    once = [binarised(GPT2), *save(tmp_path / "once"), "--max-sentences", 4, *MADE["other"]]
    assert run_cli("eval_lm", once).status == 0
    assert (tmp_path / "d_keys.npy").read_bytes() == (tmp_path / "once_keys.npy").read_bytes()


def test_the_doctor_makes_keys_of_the_recorded_module(
    stores: dict[str, Path], binarised: Any, run_cli: Any
) -> None:
    where = ["--path", GPT2, "--gen-subset", "valid", *QUIET, *HOW, *FLAGS, "--dstore-filename", stores["other"]]
    done = run_cli("doctor", [binarised(GPT2), *where])
    assert done.status == 1 and f"key module {OTHER}" in done.stderr, done.stderr
    assert "the model reproduces" in done.stderr, done.stderr
