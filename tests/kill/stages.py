"""The long jobs as the kill harness runs them: small inputs, the command as a user gives it, safe points as often as
the disk allows, and what must be equal in the end."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parent.parent / "fixtures" / "golden"
GOLDEN_HF = GOLDEN.with_name("golden-hf")
SAFE_POINT_SECONDS = 0.1
OFTEN = ("checkpoint_saving", "retrieval.datastore.writer", "retrieval.index.build_index", "retrieval.saved.searches")
OFTEN += ("retrieval.clusters.kmeans_state", "retrieval.clusters.greedy_merge", "data.document_writer")

Digest = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """command, flags: what is run in a folder that `prepare` has filled; digest: what the result is, for comparison."""

    command: str
    flags: str
    prepare: Callable[[Path], object]
    digest: Digest
    refuses: str | None = None  # what the command says when all is there already


def file_digests(*names: str) -> Digest:
    """Hashes of the named files, and the names of all that lie beside them (nothing temporary may be left)."""

    def digest(folder: Path) -> dict[str, Any]:
        out = folder / "out"
        found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        result: dict[str, Any] = {"files": found}
        for name in names or [name for name in found if not name.endswith((".log", ".trained.json"))]:
            result[name] = hashlib.blake2b((out / name).read_bytes()).hexdigest()
        return result

    return digest


def training_digest(folder: Path) -> dict[str, Any]:
    """Weights, optimiser, losses and position of the last and best checkpoint; not the seconds that it took, nor the
    history, which notes each start."""
    result: dict[str, Any] = {"files": sorted(path.name for path in (folder / "out").iterdir())}
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        state = torch.load(folder / "out" / name, weights_only=False)
        digest = hashlib.blake2b()
        for tensor in state["model"].values():
            digest.update(tensor.numpy().tobytes())
        for moments in state["last_optimizer_state"]["state"].values():
            for value in moments.values():
                digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        extra = state["extra_state"]
        losses = {key: extra.get(key) for key in ("val_loss", "best", "train_iterator")}
        result[name] = (digest.hexdigest(), losses, state["optimizer_history"][-1])
    return result


def sweep_digest(folder: Path) -> dict[str, Any]:
    """The table without its seconds."""
    lines = [line.split(",") for line in (folder / "out" / "s.csv").read_text().splitlines()]
    kept = [column for column, name in enumerate(lines[0]) if "seconds" not in name]
    return {"table": [[line[column] for column in kept] for line in lines]}


def _keys(folder: Path) -> None:
    for name in ("dstore16_keys.npy", "dstore16_vals.npy"):
        shutil.copyfile(GOLDEN / "checkpoints" / name, folder / name)


def _text(folder: Path) -> None:
    """The golden text, ten times: long enough that a kill falls into the work."""
    for split in ("train", "valid", "test"):
        text = (GOLDEN / "text" / f"wiki.{split}.tokens").read_bytes()
        (folder / f"{split}.txt").write_bytes(text * (10 if split == "train" else 1))


def _scores(folder: Path) -> None:
    """What a sweep and AdaptRet start from: saved scores of the validation text."""
    run_command("eval_lm", f"{MODEL} --gen-subset valid --save-scores scores --save-features {NEIGHBOURS}", folder)


MODEL = (
    f"{GOLDEN}/data-bin --path {GOLDEN}/checkpoints/checkpoint_best.pt --sample-break-mode none --context-window 64 "
    "--max-tokens 128 --no-progress-bar --cpu"
)
STORE = f"--dstore-filename {GOLDEN}/checkpoints/dstore16 --indexfile {GOLDEN}/checkpoints/knn16.index --dstore-fp16"
NEIGHBOURS = f"--knnlm {STORE} --dstore-size 16938 --k 64 --lmbda 0.25 --knn-sim-func do_not_recomp_l2 --no-load-keys"
TRAIN = (
    "--task language_modeling --arch transformer_lm_wiki103 --decoder-embed-dim 16 --decoder-input-dim 16 "
    "--decoder-output-dim 16 --decoder-ffn-embed-dim 32 --decoder-layers 1 --decoder-attention-heads 2 "
    "--adaptive-input-cutoff 300,900 --adaptive-softmax-cutoff 300,900 --dropout 0.1 --criterion adaptive_loss "
    "--tokens-per-sample 64 --max-tokens 512 --ddp-backend no_c10d --num-workers 0 --no-progress-bar --cpu --seed 1 "
    "--optimizer adam --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 10 --max-update 90 "
    "--no-epoch-checkpoints --skip-invalid-size-inputs-valid-test"
)
SEARCH = f"--scores scores {STORE} --dstore-size 16938 --knn-sim-func do_not_recomp_l2 --no-load-keys --no-progress-bar"

KMEANS = "--dstore dstore16 --dstore-size 16938 --dim 32 --batch-size 500 --save out/k --no-progress-bar"

NEEDS = {"tokens": "transformers"}  # stages that need an extra

STAGES: dict[str, Stage] = {
    "preprocess": Stage(
        "preprocess",
        "--only-source --trainpref train.txt --validpref valid.txt --testpref test.txt --destdir out --workers 2",
        _text,
        file_digests(),
        "a dictionary exists already",
    ),
    "tokens": Stage(
        "preprocess",
        f"--only-source --hf-tokenizer {GOLDEN_HF}/llama --hf-documents file --trainpref train.txt "
        "--validpref valid.txt --destdir out --workers 2",
        _text,
        file_digests(),
    ),
    "train": Stage("train", f"{GOLDEN}/data-bin {TRAIN} --save-dir out", lambda folder: None, training_digest),
    "save datastore": Stage(
        "eval_lm",
        f"{MODEL} --gen-subset valid --save-knnlm-dstore --dstore-mmap out/d --dstore-fp16",
        lambda folder: None,
        file_digests(),
    ),
    "build index": Stage(
        "build_dstore",
        "--dstore_mmap dstore16 --dstore_size 16938 --dimension 32 --dstore_fp16 --ncentroids 16 --code_size 2 "
        "--actual_dstore_size 8000 --num_keys_to_add_at_a_time 100 --faiss_index out/i --no-progress-bar",
        _keys,
        file_digests(),
    ),
    "k-means": Stage("kmeans", f"{KMEANS} --num-clusters 40 --sample 5000", _keys, file_digests()),
    "two-level k-means": Stage(
        "kmeans", f"{KMEANS} --num-clusters 1100 --sample 12000 --algorithm two-level", _keys, file_digests()
    ),
    "greedy merging": Stage(
        "greedy_merge",
        f"--dstore dstore16 --dstore-size 16938 --dim 32 --indexfile {GOLDEN}/checkpoints/knn16.index --save out/m "
        "--k 20 --merge 8 --no-progress-bar",
        _keys,
        file_digests(),
    ),
    "AdaptRet": Stage(
        "adaptret",
        f"{SEARCH} --save out/gate.pt --features ctxt lm_max lm_ent --epochs 8 --batch-size 256 --k 64",
        _scores,
        file_digests("gate.pt"),
    ),
    "sweep": Stage(
        "sweep",
        f"{SEARCH} --output out/s --strategy knnlm retomaton --min-knns 1 8 9999999 --k 16 64 --lmbda 0.1 0.25",
        _scores,
        sweep_digest,
    ),
}


def load_command(command: str) -> Callable[[], None]:
    """Imports a command with all its modules, with frequent safe points, and returns its entry point."""
    for name in OFTEN:
        with contextlib.suppress(ImportError):
            module: Any = importlib.import_module("fairseq." + name)
            module.SAFE_POINT_SECONDS = SAFE_POINT_SECONDS
    importlib.import_module("fairseq.checkpoint_saving").SAFE_POINT_SHARE = 1  # type: ignore[attr-defined]
    binarization = importlib.import_module("fairseq.data.binarization")
    binarization.SMALLEST_PART = 1 << 14  # type: ignore[attr-defined]  (so that small texts are shared out too)
    importlib.import_module("fairseq.data.document_files").UNIT = 1 << 13  # type: ignore[attr-defined]
    door: Callable[[], None] = importlib.import_module("fairseq_cli." + command).cli_main
    return door


def run_command(command: str, flags: str, folder: Path) -> None:
    """Runs a command in this process and in `folder`; SystemExit with a status other than 0 when it fails."""
    door = load_command(command)
    sys.argv = [command, *shlex.split(flags)]
    os.chdir(folder)
    door()
