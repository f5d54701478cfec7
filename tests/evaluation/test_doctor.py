"""The doctor detects each fault separately, and none in a correct set of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.evaluation import datastore_checks
from fairseq.evaluation.datastore_checks import OK, SUSPICIOUS, UNKNOWN, WRONG
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex

LM = "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode none --max-tokens 128 --context-window 64"
STORE = "--dstore-filename d --indexfile d.index --k 16 --lmbda 0.25 --knn-sim-func do_not_recomp_l2 --no-progress-bar"


@pytest.fixture(scope="module")
def healthy(golden: Path, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, text, and a datastore with index and clusters saved by the commands themselves."""
    folder = tmp_path_factory.mktemp("healthy")
    shutil.copytree(golden / "data-bin", folder / "data-bin")
    shutil.copytree(golden / "checkpoints", folder / "checkpoints")
    save = "--gen-subset train --save-knnlm-dstore --dstore-mmap d --dstore-fp16 --no-progress-bar"
    build = "--dstore_mmap d --faiss_index d.index --ncentroids 16 --code_size 8 --no-progress-bar"
    for command, flags in (
        ("eval_lm", f"{LM} {save}"),
        ("build_dstore", build),
        ("kmeans", "--dstore d --num-clusters 20 --sample 4000 --save c --iterations 3 --no-progress-bar"),
    ):
        done = run_cli(command, flags.split(), cwd=folder)
        assert done.status == 0, done.stderr
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    """A copy to make ill."""
    for path in healthy.iterdir():
        if path.name in ("data-bin", "checkpoints"):
            (tmp_path / path.name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def said(done: Any) -> str:
    lines = [line.split(" | ", 3) for line in done.stderr.splitlines()]
    return "\n".join(parts[3] for parts in lines if len(parts) == 4 and parts[2] == "fairseq_cli.doctor")


MEMBERS = "--members c_s4000_k20_members.pkl"


def test_a_healthy_set(healthy: Path, run_cli: Any) -> None:
    for members in (MEMBERS, "--members c_s4000_k20_clusters"):
        done = run_cli("eval_lm", f"{LM} {STORE} {members} --knnlm --check".split(), cwd=healthy)
        assert done.status == 0, said(done)
        text = said(done)
        assert text.endswith("0 wrong, 0 suspicious, 1 not known, 12 fine"), text
        for part in ("have 1504 words each", "this model and dictionary", "are words", "finite", "holds all"):
            assert part in text
        for part in ("pointers use are", "every entry is in one", "not in the datastore", "reproduces", "suits"):
            assert part in text


def doctor(folder: Path, run_cli: Any, flags: str = f"{LM} {STORE} {MEMBERS}") -> tuple[int, str]:
    done = run_cli("doctor", flags.split(), cwd=folder)
    return done.status, said(done)


def test_without_a_datastore(healthy: Path, run_cli: Any) -> None:
    status, text = doctor(healthy, run_cli, LM)
    assert status == 0 and "no datastore is named" in text


def other_weights(folder: Path) -> None:
    path = folder / "checkpoints" / "checkpoint_best.pt"
    state = torch.load(path, weights_only=False)
    for name, value in state["model"].items():
        if value.is_floating_point():
            state["model"][name] = value + 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    (folder / "checkpoints").unlink()
    (folder / "checkpoints").mkdir()
    torch.save(state, path)


def undescribed(folder: Path) -> None:
    for name in ("d.json", "d.index.json", "c_s4000_k20_members.pkl.json"):
        (folder / name).unlink()


def changed_keys(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        undescribed(folder)
        keys = np.fromfile(folder / "d_keys.npy", "<f2").reshape(-1, 32)
        change(keys)
        keys.tofile(folder / "d_keys.npy")

    return damage


def nan_keys(keys: np.ndarray) -> None:
    keys[::7] = np.nan


def same_keys(keys: np.ndarray) -> None:
    keys[:] = keys[0]


def shuffled_keys(keys: np.ndarray) -> None:
    keys[:] = keys[np.random.default_rng(0).permutation(len(keys))]


def foreign_values(folder: Path) -> None:
    undescribed(folder)
    values = np.fromfile(folder / "d_vals.npy", "<i8")
    values[5000] = 10**6
    values.tofile(folder / "d_vals.npy")


def zero_tail(folder: Path) -> None:
    undescribed(folder)
    for name, layout in (("d_keys.npy", "<f2"), ("d_vals.npy", "<i8")):
        array = np.fromfile(folder / name, layout)
        array[-len(array) // 10 :] = 0
        array.tofile(folder / name)


def half_an_index(folder: Path) -> None:
    (folder / "d.index.json").unlink()
    keys = np.fromfile(folder / "d_keys.npy", "<f2").reshape(-1, 32).astype(np.float32)
    index = faiss.IndexFlatL2(32)
    index.add(keys[: len(keys) // 2])
    faiss.write_index(index, str(folder / "d.index"))


def clusters_that_miss(folder: Path) -> None:
    import pickle

    import scipy.sparse

    (folder / "c_s4000_k20_members.pkl.json").unlink()
    matrix = scipy.sparse.csr_matrix((np.ones(100), np.arange(100), [0, 50, 100]), shape=(2, 100))
    (folder / "c_s4000_k20_members.pkl").write_bytes(pickle.dumps(matrix))


def broken_weights(folder: Path) -> None:
    """As training that went wrong leaves them."""
    undescribed(folder)
    path = folder / "checkpoints" / "checkpoint_best.pt"
    state = torch.load(path, weights_only=False)
    next(value for name, value in state["model"].items() if "fc2.weight" in name)[0, 0] = np.nan
    (folder / "checkpoints").unlink()
    (folder / "checkpoints").mkdir()
    torch.save(state, path)


def infinite_keys(keys: np.ndarray) -> None:
    keys[::7] = np.inf


def only_infinite_keys(keys: np.ndarray) -> None:
    keys[:] = np.inf


ILLNESSES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "another checkpoint": (other_weights, WRONG, "saved with the weights"),
    "another checkpoint, no sidecar": (
        lambda folder: (undescribed(folder), other_weights(folder)),
        WRONG,
        "does not reproduce",
    ),
    "keys that are no numbers": (changed_keys(nan_keys), WRONG, "are not finite"),
    "keys that are infinite": (changed_keys(infinite_keys), WRONG, "are not finite"),
    "only infinite keys": (changed_keys(only_infinite_keys), WRONG, "are not finite"),
    "weights that are no numbers": (broken_weights, WRONG, "found numbers that are not finite in"),
    "keys that are all the same": (changed_keys(same_keys), WRONG, "all sampled keys are the same"),
    "keys in another order": (changed_keys(shuffled_keys), WRONG, "does not reproduce"),
    "values that are no words": (foreign_values, WRONG, "but the dictionary has the words 0 to"),
    "an all-zero tail": (zero_tail, SUSPICIOUS, "rows are all zero"),
    "an index with too little": (half_an_index, SUSPICIOUS, "are never found"),
    "clusters that miss entries": (clusters_that_miss, SUSPICIOUS, "are in no cluster"),
    "no sidecar": (undescribed, UNKNOWN, "has no sidecar"),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", ILLNESSES)
def test_each_illness_is_named(name: str, folder: Path, run_cli: Any) -> None:
    damage, level, sentence = ILLNESSES[name]
    damage(folder)
    status, text = doctor(folder, run_cli)
    assert status == (0 if "\n0 wrong" in text else 1)
    assert any(line.startswith(level) and sentence in line for line in text.splitlines()), text


def test_words_in_another_order(folder: Path, golden: Path, run_cli: Any) -> None:
    """As many words as the model has, in another order: seen by the loss alone."""
    lines = (golden / "data-bin" / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "rolled.txt").write_text("".join([*lines[749:], *lines[:749]]))
    text = golden / "text" / "wiki.valid.tokens"
    flags = ["--only-source", "--srcdict", "rolled.txt", "--trainpref", text, "--validpref", text, "--destdir", "other"]
    assert run_cli("preprocess", flags, cwd=folder).status == 0
    status, said_text = doctor(folder, run_cli, f"{LM} --gen-subset valid".replace("data-bin", "other", 1))
    assert status == 1 and "worse than guessing among the 1504 words" in said_text


def test_ways_of_cutting_the_text_are_tried(folder: Path, run_cli: Any) -> None:
    """A datastore that nothing describes, saved in another mode than that which is evaluated."""
    undescribed(folder)
    flags = LM.replace("--sample-break-mode none", "--sample-break-mode complete")
    _, text = doctor(folder, run_cli, f"{flags} {STORE}")
    assert "stored keys (typically" in text and "with --sample-break-mode none" in text
    assert "does not reproduce" not in text and "not the tokens" not in text


def test_a_weight_that_gains_nothing_does_not_suit(healthy: Path, run_cli: Any) -> None:
    flags = LM.replace("window 64", "window 96") + " --gen-subset test --knnlm --no-pointer --k 64 --lmbda 0.25"
    files = "--dstore-filename checkpoints/dstore16 --indexfile checkpoints/knn16.index"
    _, text = doctor(healthy, run_cli, f"{flags} {files} --knn-sim-func do_not_recomp_l2")
    assert "suits" not in text and "suspicious: --lmbda 0.25 is no better than the model alone" in text


def test_nothing_compared_is_not_fine(folder: Path, run_cli: Any) -> None:
    undescribed(folder)
    (folder / "d_keys.npy").unlink()
    _, text = doctor(folder, run_cli, f"{LM} {STORE} --no-load-keys")
    unknown = [line for line in text.splitlines() if line.startswith("not known: ")]
    for part in ("no sidecar", "keys were not opened", "recall is not checked", "not made again"):
        assert any(part in line for line in unknown), text
    assert "suspicious: --knnlm is missing" in text


def test_the_text_that_was_stored_is_evaluated(healthy: Path, run_cli: Any) -> None:
    _, text = doctor(healthy, run_cli, f"{LM} {STORE} --gen-subset train")
    assert "suspicious: train is evaluated, and is what the datastore was saved from" in text


def test_stored_text_under_another_name(folder: Path, run_cli: Any, healthy: Path) -> None:
    (folder / "data-bin").unlink()
    shutil.copytree(healthy / "data-bin", folder / "data-bin")
    for end in ("bin", "idx"):
        shutil.copyfile(folder / "data-bin" / f"train.{end}", folder / "data-bin" / f"test.{end}")
    _, text = doctor(folder, run_cli)
    assert "it holds the text that is evaluated" in text


def test_a_weight_that_does_not_suit(healthy: Path, run_cli: Any) -> None:
    _, text = doctor(healthy, run_cli, f"{LM} {STORE.replace('--lmbda 0.25', '--lmbda 0.99')}")
    assert "wrong: --lmbda 0.99 makes it worse than the model alone" in text


def test_broken_weights_save_nothing(folder: Path, run_cli: Any) -> None:
    broken_weights(folder)
    before = {path.name for path in folder.iterdir()}
    for flags in ("--gen-subset valid", "--gen-subset valid --save-knnlm-dstore --dstore-mmap n --dstore-fp16"):
        error = run_cli("eval_lm", f"{LM} {flags} --no-progress-bar".split(), cwd=folder).error
        assert "checkpoint_best.pt: found numbers that are not finite in" in error
    assert {path.name for path in folder.iterdir()} == before


def test_help_of_the_doctor(run_cli: Any) -> None:
    for words, part in (["--help"], "Reads samples."), (["verify", "--help"], "Reads every byte of artefacts"):
        done = run_cli("doctor", words)
        assert done.status == 0 and part in " ".join(done.stdout.split()) and "fairseq-doctor" in done.stdout


def test_a_small_share_of_the_lists(healthy: Path, tmp_path: Path) -> None:
    """An index of far too coarse codes: recall says so."""
    keys = np.fromfile(healthy / "d_keys.npy", "<f2").reshape(-1, 32).astype(np.float32)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(32), 32, 256, 1, 4)
    index.train(keys)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "i"))
    datastore = Datastore.open(str(healthy / "d"))
    findings = list(datastore_checks.check_index(FaissIndex(str(tmp_path / "i"), len(keys), probe=1), datastore))
    assert any(f.level in (SUSPICIOUS, WRONG) and "raise --probe" in f.text for f in findings), findings


def test_two_places_that_disagree(healthy: Path, tmp_path: Path) -> None:
    datastore = Datastore.open(str(healthy / "d"))
    keys = np.asarray(datastore.keys, np.float32)
    right, other = faiss.IndexFlatL2(32), faiss.IndexFlatL2(32)
    right.add(keys)
    other.add(keys[::-1].copy())
    for name, index in (("right", right), ("other", other)):
        faiss.write_index(index, str(tmp_path / name))
    opened = [FaissIndex(str(tmp_path / name), len(keys)) for name in ("right", "other")]
    assert [f.level for f in datastore_checks.check_devices(opened[0], opened[0], datastore)] == [OK]
    assert [f.level for f in datastore_checks.check_devices(opened[0], opened[1], datastore)] == [WRONG]


def test_entries_in_two_clusters() -> None:
    clusters = Clusters(np.array([0, 3, 6]), np.array([0, 1, 2, 2, 3, 4]), np.array([0, 0, 1, 1, 1]))
    assert any("in several clusters" in finding.text for finding in datastore_checks.check_clusters(clusters, 5))


# ---------------------------------------------------------------------------------------------------------------------
# verify


ARTEFACTS = ["d", "d.index", "c_s4000_k20_members.pkl", "c_s4000_k20_clusters"]
FILES = ["d_keys.npy", "d_vals.npy", "d.index", "c_s4000_k20_members.pkl", "c_s4000_k20_clusters/members.npy"]


def test_verify_of_whole_files(healthy: Path, run_cli: Any) -> None:
    done = run_cli("doctor", ["verify", *ARTEFACTS], cwd=healthy)
    assert done.status == 0, done.stderr
    assert said(done).count("every byte is as it was written") == 7


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_a_flipped_bit_is_found(name: str, place: float, folder: Path, run_cli: Any) -> None:
    """By verify wherever it is, with its place; and on opening, as these files are small enough to be sampled whole."""
    path = folder / name
    raw = bytearray(path.read_bytes())
    at = int(place * (len(raw) - 1))
    raw[at] ^= 4
    path.write_bytes(raw)
    done = run_cli("doctor", ["verify", *ARTEFACTS], cwd=folder)
    assert done.status == 1
    (line,) = [line for line in said(done).splitlines() if line.startswith("wrong: ")]
    first, last = map(int, line.partition("bytes ")[2].split(" differ")[0].split(" to "))
    assert path.name in line and first <= at < last

    members = "--members c_s4000_k20_clusters" if "clusters" in name else MEMBERS
    flags = f"{LM} {STORE} {members}".replace("--knn-sim-func do_not_recomp_l2", "") + " --knnlm"
    error = run_cli("eval_lm", flags.split(), cwd=folder).error
    assert f"{path.name}: found" in error


def test_verify_without_a_description(folder: Path, run_cli: Any) -> None:
    undescribed(folder)
    done = run_cli("doctor", ["verify", "d", "d.index"], cwd=folder)
    assert done.status == 1
    assert said(done).count("only what this package wrote has a description") == 2


def test_results_of_the_doctor(healthy: Path, run_cli: Any, tmp_path: Path) -> None:
    run_cli("doctor", ["verify", "d", "--results-json", tmp_path / "r.json"], cwd=healthy)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["wrong"] == 0 and content["ok"] == 2 and content["findings"][0]["level"] == "ok"
