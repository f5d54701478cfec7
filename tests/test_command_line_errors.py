"""Every mistake of a user ends in one sentence on stderr, exit status 2 and no traceback."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse

LM = ["data-bin", "--path", "checkpoints/checkpoint_best.pt", "--sample-break-mode", "complete", "--max-tokens", "128"]
LM += ["--context-window", "96", "--gen-subset", "test", "--no-progress-bar"]
KNN = ["--knnlm", "--dstore-filename", "checkpoints/dstore16", "--indexfile", "checkpoints/knn16.index"]
KNN += ["--dstore-fp16", "--dstore-size", "16938", "--k", "16", "--lmbda", "0.25"]
QUANTISED = ["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"]
MEMBERS = ["--members", "checkpoints/kmeans_s40000000_k400_members.pkl"]


def changed(flags: list[str], name: str, value: str | None = None) -> list[str]:
    """The flags with another value of one of them, or without it."""
    at = flags.index(name)
    return flags[:at] + ([] if value is None else [name, value]) + flags[at + 2 :]


CASES: dict[str, tuple[list[str], str]] = {
    "unknown flag": ([*LM, "--lambda", "0.5"], "unrecognized arguments: --lambda 0.5"),
    "abbreviated flag": ([*LM, "--context", "5"], "unrecognized arguments: --context 5"),
    "no data": ([], "the following arguments are required: data"),
    "missing folder": (["nowhere", *LM[1:]], "nowhere/dict.txt: no such file"),
    "missing split": (changed(LM, "--gen-subset", "dev"), "data-bin/dev"),
    "no model": (changed(LM, "--path"), "--path: found nothing"),
    "missing model": (changed(LM, "--path", "lost.pt"), "lost.pt: no such file"),
    "model that is none": (changed(LM, "--path", "data-bin/dict.txt"), "data-bin/dict.txt: found"),
    "window as long as a sample": (changed(LM, "--context-window", "128"), "--context-window: found 128"),
    "negative window": (changed(LM, "--context-window", "-1"), "--context-window"),
    "unknown break mode": (changed(LM, "--sample-break-mode", "lines"), "--sample-break-mode"),
    "overrides that are code": (
        [*LM, "--model-overrides", "__import__('os').mkdir('owned')"],
        "--model-overrides: found \"__import__('os').mkdir('owned')\", expected a dictionary",
    ),
    "overrides that call": ([*LM, "--model-overrides", "{'knn_keytype': open('owned', 'w')}"], "--model-overrides"),
    "overrides that are no dict": ([*LM, "--model-overrides", "[1]"], "--model-overrides"),
    "overrides cut short": ([*LM, "--model-overrides", "{'knn_keytype':"], "--model-overrides"),
    "unknown key type": ([*LM, *KNN, "--knn-keytype", "first_ffn_input"], "--knn-keytype: found first_ffn_input"),
    "saving and using": ([*LM, *KNN, "--save-knnlm-dstore", "--dstore-mmap", "x"], "--save-knnlm-dstore"),
    "saving to nowhere": ([*LM, "--save-knnlm-dstore"], "--dstore-mmap: found nothing"),
    "no datastore": ([*LM, *changed(KNN, "--dstore-filename")], "--dstore-filename: found nothing"),
    "no index": ([*LM, *changed(KNN, "--indexfile")], "--indexfile: found nothing"),
    "missing datastore": ([*LM, *changed(KNN, "--dstore-filename", "lost")], "lost_vals.npy: no such file"),
    "missing index": ([*LM, *changed(KNN, "--indexfile", "lost.index")], "lost.index: no such file"),
    "index that is none": ([*LM, *changed(KNN, "--indexfile", "data-bin/dict.txt")], "data-bin/dict.txt: found a file"),
    "size too large": ([*LM, *changed(KNN, "--dstore-size", "16939")], "dstore16_vals.npy: found 135504 bytes"),
    "size too small": (
        [*LM, *changed(KNN, "--dstore-size", "16937")],
        "knn16.index: found 16938 entries, expected at most the datastore's 16937",
    ),
    "size that is no number": ([*LM, *changed(KNN, "--dstore-size", "many")], "--dstore-size"),
    "k 0": ([*LM, *changed(KNN, "--k", "0")], "--k: found 0, expected at least 1"),
    "lmbda 2": ([*LM, *changed(KNN, "--lmbda", "2")], "--lmbda: found 2.0, expected a number from 0 to 1"),
    "lmbda -0.1": ([*LM, *changed(KNN, "--lmbda", "-0.1")], "--lmbda"),
    "lmbda nan": ([*LM, *changed(KNN, "--lmbda", "nan")], "--lmbda"),
    "probe 0": ([*LM, *KNN, "--probe", "0"], "--probe"),
    "max-knns 0": ([*LM, *KNN, "--max-knns", "0"], "--max-knns"),
    "temperature 0": ([*LM, *KNN, "--knn-temp", "0"], "--knn-temp"),
    "unknown function": ([*LM, *KNN, "--knn-sim-func", "cosine"], "--knn-sim-func: found cosine, expected"),
    "unknown metric": ([*LM, *KNN, "--faiss-metric-type", "cosine"], "--faiss-metric-type: found cosine"),
    "metric of another index": ([*LM, *KNN, "--faiss-metric-type", "ip"], "--faiss-metric-type: found ip"),
    "unknown strategy": ([*LM, *KNN, "--strategy", "guess"], "--strategy"),
    "exact distances without keys": ([*LM, *KNN, "--no-load-keys"], "--no-load-keys"),
    "shard that is none": ([*changed(LM, "--context-window", "0"), "--shard-id", "5"], "--shard-id: found 5, expected"),
    "missing members": ([*LM, *KNN, *QUANTISED, "--members", "lost.pkl"], "lost.pkl: no such file"),
    "members that are none": ([*LM, *KNN, *QUANTISED, "--members", "data-bin/dict.txt"], "data-bin/dict.txt: found"),
}


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the golden bundle, for what should never be written but could be."""
    folder = tmp_path_factory.mktemp("bundle") / "golden"
    shutil.copytree(golden, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_eval_lm(case: str, folder: Path, run_cli: Any) -> None:
    arguments, sentence = CASES[case]
    error = run_cli("eval_lm", arguments, cwd=folder).error
    assert error.startswith("eval_lm.py: error: ")
    assert sentence in error
    assert not (folder / "owned").exists()


def half(name: str) -> Callable[[Path], object]:
    """Cuts a file of the folder in the middle."""

    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def other_dimension(folder: Path) -> None:
    """An index of vectors of 16 numbers, where the model's keys have 32."""
    index = faiss.IndexFlatL2(16)
    index.add(np.zeros((16938, 16), np.float32))
    faiss.write_index(index, str(folder / "checkpoints" / "knn16.index"))


def more_entries(folder: Path) -> None:
    index = faiss.IndexFlatL2(32)
    index.add(np.zeros((16939, 32), np.float32))
    faiss.write_index(index, str(folder / "checkpoints" / "knn16.index"))


def other_members(folder: Path) -> None:
    """Members of a larger datastore."""
    matrix = scipy.sparse.csr_matrix(([1], ([0], [20000])), shape=(1, 20001))
    (folder / MEMBERS[1]).write_bytes(pickle.dumps(matrix))


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def attacking_members(folder: Path) -> None:
    (folder / MEMBERS[1]).write_bytes(pickle.dumps(Attack()))


def other_description(folder: Path) -> None:
    """A datastore that says that its keys are of another width."""
    description = {"kind": "datastore", "format_version": 1, "rows": 16938, "dimension": 16}
    (folder / "checkpoints" / "dstore16.json").write_text(
        json.dumps({**description, "key_dtype": "<f4", "value_dtype": "<i8"})
    )


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "truncated keys": (half("checkpoints/dstore16_keys.npy"), [], "dstore16_keys.npy: found 542016 bytes"),
    "truncated values": (half("checkpoints/dstore16_vals.npy"), QUANTISED, "dstore16_vals.npy: found 67752 bytes"),
    "truncated index": (half("checkpoints/knn16.index"), QUANTISED, "knn16.index: found a file that"),
    "truncated members": (half(MEMBERS[1]), [*QUANTISED, *MEMBERS], "_members.pkl: found"),
    "truncated checkpoint": (half("checkpoints/checkpoint_best.pt"), [], "checkpoint_best.pt: found"),
    "truncated text": (half("data-bin/test.bin"), [], "data-bin/test"),
    "truncated text index": (half("data-bin/test.idx"), [], "data-bin/test.idx"),
    "index of another dimension": (other_dimension, QUANTISED, "--indexfile: found an index of dimension 16"),
    "index of a larger datastore": (more_entries, QUANTISED, "found 16939 entries, expected at most the datastore's"),
    "members of a larger datastore": (other_members, [*QUANTISED, *MEMBERS], "_members.pkl: found member"),
    "members that run code": (attacking_members, [*QUANTISED, *MEMBERS], "_members.pkl: found the Python object"),
    "description of another datastore": (other_description, QUANTISED, "dstore16"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files(case: str, golden: Path, tmp_path: Path, run_cli: Any) -> None:
    damage, flags, sentence = DAMAGES[case]
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder, ignore=shutil.ignore_patterns("expected.*", "text", "train.*", "valid.*"))
    damage(folder)
    error = run_cli("eval_lm", [*LM, *KNN, *flags], cwd=folder).error
    assert error.startswith("eval_lm.py: error: ")
    assert sentence in error
    assert not (folder / "owned").exists()


STORE = "--dstore_mmap checkpoints/dstore16 --dstore_fp16 --faiss_index OUT/i"
KEYS = "--dstore checkpoints/dstore16 --sample 100 --save OUT/k"
COMMANDS = {
    "preprocess --only-source --trainpref lost.txt --destdir OUT --workers 1": "lost.txt",
    "preprocess --only-sauce": "--only-sauce",
    "preprocess --only-source --trainpref text/wiki.train.tokens --validpref , --destdir OUT/b": "--validpref: found",
    "preprocess --only-source --trainpref text/wiki.train.tokens --testpref a,,b --destdir OUT/b": "--testpref: found",
    "preprocess --only-source --trainpref text/wiki.train.tokens --testpref a --destdir OUT/b": "a: no such file",
    "preprocess --only-source --testpref text/wiki.test.tokens --srcdict a --destdir OUT/b": "a: no such file; give",
    "preprocess --only-source --testpref text/wiki.test.tokens --padding-factor -1": "--padding-factor: found '-1'",
    "train data-bin --task language_modeling --larning-rate 1": "--larning-rate",
    "train data-bin --task language_modeling --arch transformer_lm_huge": "--arch",
    "train lost --task language_modeling --max-tokens 64": "lost/dict.txt: no such file",
    "build_dstore --faiss_index OUT/i": "--dstore_mmap",
    "build_dstore --dstore_mmap lost --faiss_index OUT/i": "lost_vals.npy: no such file",
    f"build_dstore {STORE} --dimension 33 --ncentroids 8": "dstore16_keys.npy: found 1084032 bytes",
    f"build_dstore {STORE} --dimension 32 --code_size 7": (
        "--code_size: found 7, expected a divisor of the dimension 32; give --code_size 4"
    ),
    f"build_dstore {STORE} --dimension 32": (
        "--code_size: found 64 (the default), expected a divisor of the dimension 32; give --code_size 32"
    ),
    f"build_dstore {STORE} --dimension 32 --preset fast": (
        "found 64 (the default), expected a divisor of half the dimension 32; give --code_size 16"
    ),
    f"build_dstore {STORE} --dimension 32 --preset fast --pca 31": "the dimension 31; leave out --preset fast",
    f"build_dstore {STORE} --dimension 32 --code_size 8 --ncentroids 20000": "--ncentroids: found 20000",
    f"build_dstore {STORE} --dimension 32 --actual_dstore_size 20000": "--actual_dstore_size: found 20000",
    "kmeans --dstore lost --num-clusters 4 --sample 100": "lost_vals.npy: no such file",
    f"kmeans {KEYS} --dim 32 --num-clusters 20000": "--num-clusters: found 20000",
    f"kmeans {KEYS} --dim 31 --num-clusters 4": "dstore16_keys.npy: found 1084032 bytes",
    f"kmeans {KEYS} --dim 32 --num-clusters 0": "--num-clusters",
    f"kmeans {KEYS} --dim 32 --num-clusters 4 --seed -1": "--seed: found '-1', expected an integer from 0",
    f"kmeans {KEYS} --dim 32 --num-clusters 4 --seed 2147483648": "--seed: found '2147483648', expected an integer",
    f"build_dstore {STORE} --dimension 32 --seed -1": "--seed: found '-1'",
    "build_dstore --dstore_mmap checkpoints/dstore16 --faiss_index checkpoints": "--faiss_index: found the folder",
    "greedy_merge --dstore checkpoints/dstore16 --indexfile checkpoints/knn16.index --seed -1": "--seed: found '-1'",
}

TRAIN = "train data-bin --task language_modeling --max-tokens 512 --cpu --num-workers 0 --save-dir OUT/c"
WRONG_NUMBERS = {
    "--seed -1": "--seed: found '-1', expected an integer from 0 to 4294967295",
    "--seed 99999999999999999999": "--seed: found '99999999999999999999'",
    "--fixed-validation-seed -5": "--fixed-validation-seed: found '-5'",
    "--decoder-attention-heads 0": "--decoder-attention-heads: found '0', expected an integer of at least 1",
    "--decoder-embed-dim 0": "--decoder-embed-dim: found '0'",
    "--decoder-ffn-embed-dim -1": "--decoder-ffn-embed-dim: found '-1'",
    "--dropout 2": "--dropout: found '2', expected a number from 0 to 1",
    "--adaptive-softmax-cutoff 300 --adaptive-softmax-factor 0": "--adaptive-softmax-factor: found '0'",
    "--adaptive-softmax-cutoff foo": "--adaptive-softmax-cutoff: found 'foo', expected numbers such as 20000,60000",
    "--adaptive-input --adaptive-input-cutoff foo": "--adaptive-input-cutoff: found 'foo'",
    "--tokens-per-sample 0": "--tokens-per-sample: found '0'",
    "--lr nan": "--lr/--learning-rate: found 'nan', expected numbers of at least 0",
    "--lr 0.1,inf": "found '0.1,inf'",
    "--lr -1": "found '-1'",
    "--clip-norm nan": "--clip-norm: found 'nan', expected a number",
    "--optimizer adam --adam-betas foo": "--adam-betas: found 'foo', expected numbers such as 0.25,0.1",
    "--optimizer adam --adam-betas 0.9,2": "--adam-betas: found '0.9,2', expected two numbers from 0 to below 1",
    "--optimizer adam --adam-eps -1": "--adam-eps: found '-1'",
    "--optimizer adam --weight-decay nan": "--weight-decay/--wd: found 'nan'",
    "--warmup-updates -3": "--warmup-updates: found '-3', expected an integer of at least 0",
    "--lr-scheduler cosine --max-lr 1 --warmup-updates 100 --max-update 4": "--warmup-updates: found 100, expected few",
    "--lr-scheduler cosine --max-lr 1 --max-update 0": "--warmup-updates: found 0, expected --max-update beside it",
    "--criterion label_smoothed_cross_entropy --label-smoothing 7": "--label-smoothing: found '7'",
    "--distributed-world-size 2": "--distributed-world-size: found 2, expected 1; this package trains in one process",
    "--valid-subset ,": "--valid-subset",
}
COMMANDS |= {f"{TRAIN} {flags}": sentence for flags, sentence in WRONG_NUMBERS.items()}


@pytest.mark.parametrize("line", COMMANDS)
def test_other_commands(line: str, golden: Path, tmp_path: Path, run_cli: Any) -> None:
    sentence = COMMANDS[line]
    command, *arguments = (word.replace("OUT", str(tmp_path)) for word in line.split())
    error = run_cli(command, arguments, cwd=golden).error
    assert re.match(rf"{command}(\.py)?: error: ", error)
    assert sentence in error
    assert not list(tmp_path.iterdir()), "files or empty folders are left"


@pytest.mark.parametrize("door", ["preprocess", "train", "eval_lm", "build_dstore", "kmeans"])
def test_through_the_door(door: str, tmp_path: Path, run_door: Any) -> None:
    """As a process of its own, started elsewhere: the same sentence and status."""
    finished = run_door(door + ".py", ["--task", "language_modeling", "--no-such-flag"], cwd=tmp_path)
    assert re.fullmatch(rf"{door}\.py: error: .*see {door}\.py --help", finished.error)
    assert finished.stdout == ""


def test_a_trained_index_that_is_cut_short(golden: Path, tmp_path: Path, run_cli: Any) -> None:
    """What is left of an index names the one file that is in the way."""
    flags = f"--dstore_mmap checkpoints/dstore16 --dstore_fp16 --dimension 32 --faiss_index {tmp_path}/i --ncentroids 4"
    assert run_cli("build_dstore", [*flags.split(), "--code_size", "2"], cwd=golden).status == 0
    half("i.trained")(tmp_path)
    error = run_cli("build_dstore", [*flags.split(), "--code_size", "2"], cwd=golden).error
    assert "i.trained: found bytes that differ from those that were written" in error
    assert "delete this file to train again" in error
    (tmp_path / "i.trained.json").unlink()
    error = run_cli("build_dstore", [*flags.split(), "--code_size", "2"], cwd=golden).error
    assert "i.trained: found a file that FAISS cannot read" in error and "delete this file to train again" in error
    (tmp_path / "i.trained").unlink()
    assert run_cli("build_dstore", [*flags.split(), "--code_size", "2"], cwd=golden).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "i.json", "i.trained", "i.trained.json"]


@pytest.mark.parametrize("command", ["kmeans", "build_dstore", "eval_lm"])
def test_results_that_could_not_be_written_are_refused_at_once(command: str, run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "file" / "r.json", tmp_path, tmp_path / "pipe", "/proc/r.json", "/proc/new/r.json"):
        error = run_cli(command, ["--results-json", place]).error
        assert "argument --results-json: found" in error and str(place) in error
    error = run_cli(command, ["--results-json", tmp_path / "new" / "r.json"]).error
    assert "--results-json" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
