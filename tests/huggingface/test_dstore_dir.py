"""`--dstore-dir`: files of knn-transformers are found by their names, in every command that searches a datastore."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

LAYOUT = "gpt2_17662_32"
SEARCH = ["--k", 32, "--lmbda", 0.25, "--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"]
WINDOWS = ["--gen-subset", "valid", "--max-length", 128, "--stride", 64, "--cpu", "--no-progress-bar"]


@pytest.fixture
def folder(golden_hf: Path, tmp_path: Path) -> Path:
    """The peer's values, index and clusters in one folder, without keys."""
    target = tmp_path / "peer"
    target.mkdir()
    for path in [*(golden_hf / "gpt2/dstore").iterdir(), *(golden_hf / "gpt2/clusters").iterdir()]:
        if "keys" not in path.name:
            shutil.copyfile(path, target / path.name)
    return target


@pytest.fixture
def evaluate(binarised: Any, golden_hf: Path, run_cli: Any, tmp_path: Path) -> Any:
    """evaluate(flags): (status, log, the results)."""

    def run(*flags: Any) -> tuple[Any, dict[str, Any]]:
        data, results = binarised(golden_hf / "gpt2"), tmp_path / "r.json"
        common = [data, "--path", golden_hf / "gpt2", *WINDOWS, "--results-json", results]
        done = run_cli("eval_lm", [*common, "--knnlm", *SEARCH, *flags])
        return done, json.loads(results.read_text()) if done.status == 0 else {}

    return run


def older(path: Path, seconds: int) -> None:
    time = os.stat(path).st_mtime - seconds
    os.utime(path, (time, time))


def test_index_and_values_suffice(folder: Path, evaluate: Any) -> None:
    found, by_folder = evaluate("--dstore-dir", folder)
    assert found.status == 0, found.stderr
    members = folder / "members_gpt2_17662_32_20000000_200.pkl"
    named, by_name = evaluate(
        "--dstore-filename", folder / f"dstore_{LAYOUT}", "--indexfile", folder / f"index_{LAYOUT}.indexed",
        "--members", members,
    )
    assert named.status == 0, named.stderr
    assert by_folder["loss_base2"] == by_name["loss_base2"]
    assert str(members) in found.stderr + found.stdout


def test_the_newest_of_several(folder: Path, evaluate: Any) -> None:
    """By the time of the values; which one is said, and its own index and clusters go with it."""
    _, expected = evaluate("--dstore-dir", folder)
    shutil.copyfile(folder / f"dstore_{LAYOUT}_vals.npy", folder / "dstore_llama_17662_32_vals.npy")
    other = folder / "members_gpt2_17662_32_5_200.pkl"
    shutil.copyfile(folder / "members_gpt2_17662_32_20000000_200.pkl", other)
    older(folder / "dstore_llama_17662_32_vals.npy", 100)
    older(other, 100)
    done, results = evaluate("--dstore-dir", folder)
    assert done.status == 0 and results["loss_base2"] == expected["loss_base2"]
    log = done.stderr + done.stdout
    assert f"has 2 datastores; the newest is taken, dstore_{LAYOUT}_vals.npy, and not dstore_llama" in log
    assert "has 2 files of clusters; the newest is taken, members_gpt2_17662_32_20000000_200.pkl" in log
    older(folder / f"dstore_{LAYOUT}_vals.npy", 1000)
    done, _ = evaluate("--dstore-dir", folder)  # the other is newest now, and has no index
    assert "--indexfile: found nothing" in done.error


def test_equally_new(folder: Path, evaluate: Any) -> None:
    shutil.copyfile(folder / f"dstore_{LAYOUT}_vals.npy", folder / "dstore_llama_17662_32_vals.npy")
    for path in folder.glob("dstore_*"):
        os.utime(path, (1e9, 1e9))
    done, _ = evaluate("--dstore-dir", folder)
    assert "equally new" in done.error and "name one by --dstore-filename" in done.error


BAD: dict[str, tuple[Any, list[Any], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), [], "a folder with the files of a datastore"),
    "no values": (lambda folder: (folder / f"dstore_{LAYOUT}_vals.npy").unlink(), [], "no dstore_MODEL_SIZE_WIDTH"),
    "cut short": (lambda folder: os.truncate(folder / f"dstore_{LAYOUT}_vals.npy", 9), [], "9 bytes in dstore_gpt2"),
    "no index": (lambda folder: (folder / f"index_{LAYOUT}.indexed").unlink(), [], "--indexfile: found nothing"),
    "two names": (lambda folder: None, ["--dstore-filename", "d"], "--dstore-filename beside it"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_do_not_serve(case: str, folder: Path, evaluate: Any) -> None:
    damage, flags, said = BAD[case]
    damage(folder)
    done, _ = evaluate("--dstore-dir", folder, *flags)
    assert said in done.error


def test_sweep_and_adaptret(
    folder: Path, evaluate: Any, run_cli: Any, binarised: Any, golden_hf: Path, tmp_path: Path
) -> None:
    _, expected = evaluate("--dstore-dir", folder, "--save-scores", tmp_path / "scores", "--save-features")
    common = ["--scores", tmp_path / "scores", "--no-progress-bar", "--knn-sim-func", "do_not_recomp_l2"]
    common += ["--no-load-keys", "--dstore-dir", folder, "--k", 32]
    swept = run_cli("sweep", [*common, "--output", tmp_path / "s"])
    assert swept.status == 0, swept.stderr
    (point,) = json.loads((tmp_path / "s.json").read_text())["points"]
    assert point["loss_base2"] == pytest.approx(expected["loss_base2"], rel=1e-6)  # with the folder's clusters
    trained = run_cli("adaptret", [*common, "--save", tmp_path / "gate", "--epochs", 1, "--features", "lm_max"])
    assert trained.status == 0, trained.stderr
    for command, output in (("sweep", "--output"), ("adaptret", "--save")):
        without = [*common[:6], output, tmp_path / "x"]
        assert "a datastore's files, or --dstore-dir DIR" in run_cli(command, without).error
