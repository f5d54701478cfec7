"""What is written, to the byte: every file is taken apart here with struct, numpy, torch, faiss and pickle alone, in
the way fairseq and the original RetoMaton open it."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import shlex
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse
import torch

SMALL = shlex.split(
    "--task language_modeling --decoder-embed-dim 16 --decoder-input-dim 16 --decoder-output-dim 16 "
    "--decoder-ffn-embed-dim 24 --decoder-layers 2 --decoder-attention-heads 2 --tokens-per-sample 32 --max-tokens 128 "
    "--max-update 3 --num-workers 0 --no-progress-bar --cpu --seed 1 --no-epoch-checkpoints --no-last-checkpoints"
)
ADAPTIVE = shlex.split(
    "--arch transformer_lm_wiki103 --adaptive-input-cutoff 20,50 --adaptive-softmax-cutoff 20,50 "
    "--criterion adaptive_loss --ddp-backend no_c10d --optimizer nag --lr 0.0001 --max-lr 0.01 --lr-scheduler cosine "
    "--lr-period-updates 10"
)
PLAIN = shlex.split("--arch transformer_lm_gbw --decoder-attention-heads 2 --optimizer adam --lr 0.001")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(name="trained", scope="module")
def trained_fixture(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained(recipe): path of a checkpoint after three updates."""
    world = make_world(tmp_path_factory.mktemp("trained"))
    made: dict[str, Path] = {}

    def trained(name: str, *flags: str) -> Path:
        if name not in made:
            recipe = ADAPTIVE if name == "adaptive" else PLAIN
            folder = world.folder / name
            done = world.run("train", [world.data, *SMALL, *recipe, "--save-dir", folder, *flags])
            assert done.status == 0, done.stderr
            made[name] = folder / "checkpoint_best.pt"
        return made[name]

    return trained


def read(path: Path) -> Any:
    """As fairseq does: torch.load, everything allowed."""
    return torch.load(path, map_location="cpu", weights_only=False)


LAYER = {
    "self_attn.k_proj": (16, 16),
    "self_attn.v_proj": (16, 16),
    "self_attn.q_proj": (16, 16),
    "self_attn.out_proj": (16, 16),
    "self_attn_layer_norm": (16,),
    "fc1": (24, 16),
    "fc2": (16, 24),
    "final_layer_norm": (16,),
}


def layer_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for number in (0, 1):
        for name, shape in LAYER.items():
            shapes[f"decoder.layers.{number}.{name}.weight"] = shape
            shapes[f"decoder.layers.{number}.{name}.bias"] = shape[:1]
    return shapes


ADAPTIVE_SHAPES = {
    "decoder.version": (1,),
    "decoder.embed_tokens._float_tensor": (1,),
    "decoder.embed_tokens.embeddings.0.0.weight": (20, 16),
    "decoder.embed_tokens.embeddings.0.1.weight": (16, 16),
    "decoder.embed_tokens.embeddings.1.0.weight": (30, 4),
    "decoder.embed_tokens.embeddings.1.1.weight": (16, 4),
    "decoder.embed_tokens.embeddings.2.0.weight": (50, 1),
    "decoder.embed_tokens.embeddings.2.1.weight": (16, 1),
    "decoder.embed_positions._float_tensor": (1,),
    **layer_shapes(),
    "decoder.adaptive_softmax.version": (1,),
    "decoder.adaptive_softmax.head._float_tensor": (1,),
    "decoder.adaptive_softmax.head.word_proj.weight": (20, 16),
    "decoder.adaptive_softmax.head.class_proj.weight": (2, 16),
    "decoder.adaptive_softmax.tail.0.0.weight": (16, 4),
    "decoder.adaptive_softmax.tail.0.2.weight": (30, 4),
    "decoder.adaptive_softmax.tail.1.0.weight": (16, 1),
    "decoder.adaptive_softmax.tail.1.2.weight": (50, 1),
}
PLAIN_SHAPES = {
    "decoder.version": (1,),
    "decoder.embed_out": (100, 16),
    "decoder.embed_tokens.weight": (100, 16),
    "decoder.embed_positions._float_tensor": (1,),
    **layer_shapes(),
}
TIED = {
    "head.word_proj.weight": "0.0.weight",
    "tail.0.0.weight": "1.1.weight",
    "tail.0.2.weight": "1.0.weight",
    "tail.1.0.weight": "2.1.weight",
    "tail.1.2.weight": "2.0.weight",
}


@pytest.mark.parametrize(("name", "shapes"), [("adaptive", ADAPTIVE_SHAPES), ("plain", PLAIN_SHAPES)])
def test_parameters(trained: Any, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = read(trained(name))["model"]
    assert type(model) is OrderedDict
    assert {key: tuple(value.shape) for key, value in model.items()} == shapes
    assert model["decoder.version"].tolist() == [3.0]
    whole = {key: value.dtype for key, value in model.items() if value.dtype != torch.float32}
    assert whole == ({"decoder.adaptive_softmax.version": torch.int64} if name == "adaptive" else {})
    if name == "adaptive":
        assert model["decoder.adaptive_softmax.version"].tolist() == [1]
        for output, embedding in TIED.items():
            one = model["decoder.adaptive_softmax." + output]
            assert torch.equal(one, model["decoder.embed_tokens.embeddings." + embedding])


def test_rules_of_newer_readers_lead_to_their_names(trained: Any) -> None:
    """fairseq 0.12 drops the positions' dummy and renames the output matrix; nothing may be missing or left over."""
    for name, shapes in (("adaptive", ADAPTIVE_SHAPES), ("plain", PLAIN_SHAPES)):
        state = dict(read(trained(name))["model"])
        for key in ("decoder.embed_positions.weights", "decoder.embed_positions._float_tensor"):
            state.pop(key, None)
        if "decoder.embed_out" in state:
            state["decoder.output_projection.weight"] = state.pop("decoder.embed_out")
        wanted = set(shapes) - {"decoder.embed_positions._float_tensor", "decoder.embed_out"}
        if name == "plain":
            wanted.add("decoder.output_projection.weight")
        assert set(state) == wanted
        assert state["decoder.version"][0] > 2  # else the final layer norm would be dropped


@pytest.mark.parametrize("name", ["adaptive", "plain"])
def test_top_level(trained: Any, name: str) -> None:
    content = read(trained(name))
    assert set(content) == {"args", "model", "optimizer_history", "extra_state", "last_optimizer_state"}
    args = content["args"]
    assert type(args).__module__ == "argparse"
    assert (args.task, args.tokens_per_sample, args.max_target_positions) == ("language_modeling", 32, 32)
    assert (args.decoder_embed_dim, args.decoder_layers) == (16, 2)  # what the architecture filled in is there too
    (history,) = content["optimizer_history"]
    names = {"adaptive": ("AdaptiveLoss", "FairseqNAG"), "plain": ("CrossEntropyCriterion", "FairseqAdam")}[name]
    assert (history["criterion_name"], history["optimizer_name"]) == names
    assert history["num_updates"] == 3
    assert set(history) == {"criterion_name", "optimizer_name", "lr_scheduler_state", "num_updates"}
    extra = content["extra_state"]
    assert {"train_iterator", "val_loss", "best", "metrics"} <= set(extra)
    assert {"epoch", "iterations_in_epoch"} <= set(extra["train_iterator"])
    assert type(extra["val_loss"]) is float


def test_optimizer_state(trained: Any) -> None:
    distinct = len(ADAPTIVE_SHAPES) - len(TIED) - 5  # buffers and tied names have no state of their own
    nag = read(trained("adaptive"))["last_optimizer_state"]
    assert set(nag) == {"state", "param_groups"}
    assert len(nag["state"]) == distinct == len(nag["param_groups"][0]["params"])
    assert set(nag["state"][0]) == {"momentum_buffer"}
    assert {"lr", "lr_old", "momentum", "weight_decay", "params"} <= set(nag["param_groups"][0])
    adam = read(trained("plain"))["last_optimizer_state"]
    assert {"step", "exp_avg", "exp_avg_sq"} == set(adam["state"][0])
    tensors = [value for state in (nag, adam) for entry in state["state"].values() for value in entry.values()]
    assert all(value.dtype == torch.float32 for value in tensors if isinstance(value, torch.Tensor))


def test_nothing_of_this_package_is_pickled(trained: Any) -> None:
    """Only what older Python, PyTorch and fairseq can import is named in the file."""
    with zipfile.ZipFile(trained("adaptive")) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        raw = archive.read(name)
    named = {argument for opcode, argument, _ in pickletools.genops(io.BytesIO(raw)) if opcode.name == "GLOBAL"}
    assert named == {
        "argparse Namespace",
        "collections OrderedDict",
        "torch FloatStorage",
        "torch LongStorage",
        "torch._utils _rebuild_tensor_v2",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Binarised text


def test_binarised_text(run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("b a\n\nb c\n")
    flags = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", tmp_path / "out"]
    assert run_cli("preprocess", [*flags, "--task", "language_modeling"]).status == 0
    out = tmp_path / "out"
    assert (out / "dict.txt").read_bytes() == b"b 2\na 1\nc 1\nmadeupword0000 0\n"
    assert (out / "train.bin").read_bytes() == struct.pack("<7H", 4, 5, 2, 2, 4, 6, 2)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, 3)
    index += struct.pack("<3i", 3, 1, 3) + struct.pack("<3q", 0, 6, 8)
    assert (out / "train.idx").read_bytes() == index
    names = ["dict.txt", "preprocess.log", "train.bin", "train.idx", "train.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_binarised_text_in_the_older_format(run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("b a\n\nb c\n")
    flags = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", tmp_path / "out", "--dataset-impl", "lazy"]
    assert run_cli("preprocess", [*flags, "--task", "language_modeling"]).status == 0
    assert (tmp_path / "out" / "train.bin").read_bytes() == struct.pack("<7i", 5, 6, 3, 3, 5, 7, 3)
    header = b"TNTIDX\x00\x00" + struct.pack("<5Q", 1, 4, 4, 3, 3)
    tables = struct.pack("<4q", 0, 1, 2, 3) + struct.pack("<4q", 0, 3, 4, 7) + struct.pack("<3q", 3, 1, 3)
    assert (tmp_path / "out" / "train.idx").read_bytes() == header + tables


# ---------------------------------------------------------------------------------------------------------------------
# Datastore, index, members


@pytest.fixture(name="made", scope="module")
def made_fixture(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved datastore, the index and the clusters built from it."""
    folder = tmp_path_factory.mktemp("made")
    run = store.world.run
    flags = ["--save-knnlm-dstore", "--dstore-mmap", folder / "dstore16", "--dstore-fp16", "--context-window", 8]
    store.world.evaluate(store.checkpoint, *flags, split="train")
    build = ["--dstore_mmap", folder / "dstore16", "--faiss_index", folder / "knn16.index", "--ncentroids", 8]
    build += ["--code_size", 4, "--no-progress-bar", "--probe", 4]
    assert run("build_dstore", build).status == 0
    cluster = ["--dstore", folder / "dstore16", "--num-clusters", 20, "--sample", 1000, "--save", folder / "kmeans"]
    done = run("kmeans", [*cluster, "--no-progress-bar", "--results-json", folder / "results.json"])
    assert done.status == 0, done.stderr
    return folder


def test_datastore(store: Any, made: Path, by_hand: Any) -> None:
    """The text without its first block, contiguous and in order; opened by shape, as the original does."""
    tokens = np.concatenate(by_hand.text_lines(1, 60))
    stored = tokens[24:]  # blocks of 32 - 8 tokens; the first has less than 8 before it and is left out
    count = len(stored)
    keys = np.memmap(made / "dstore16_keys.npy", dtype=np.float16, mode="r", shape=(count, 16))
    values = np.memmap(made / "dstore16_vals.npy", dtype=np.int64, mode="r", shape=(count, 1))
    assert (made / "dstore16_keys.npy").stat().st_size == count * 16 * 2
    assert (made / "dstore16_vals.npy").stat().st_size == count * 8
    np.testing.assert_array_equal(values[:, 0], stored)
    assert np.isfinite(keys).all() and (keys != 0).any(axis=1).all()
    info = json.loads((made / "dstore16.json").read_text())
    assert info["kind"] == "datastore" and info["format_version"] == 1
    assert (info["rows"], info["filled_rows"], info["dimension"]) == (count, count, 16)
    assert (info["key_dtype"], info["value_dtype"]) == ("<f2", "<i8")
    assert (info["key_type"], info["context_window"], info["tokens_per_sample"]) == ("last_ffn_input", 8, 24)
    assert set(info["data"]) == {"dict.txt", "train.bin", "train.idx"}
    assert len(info["models"]) == 1


def test_index(made: Path) -> None:
    index = faiss.read_index(str(made / "knn16.index"), faiss.IO_FLAG_ONDISK_SAME_DIR)
    assert type(index) is faiss.IndexIVFPQ
    rows = json.loads((made / "dstore16.json").read_text())["rows"]
    assert (index.ntotal, index.d, index.nlist, index.pq.M, index.pq.nbits) == (rows, 16, 8, 4, 8)
    assert index.metric_type == faiss.METRIC_L2 and index.by_residual and index.nprobe == 4
    index.nprobe = 8
    index.make_direct_map()  # as RetoMaton does before it reconstructs; needs ids 0 .. N-1
    keys = np.fromfile(made / "dstore16_keys.npy", "<f2").reshape(rows, 16).astype(np.float32)
    near = np.stack([index.reconstruct(number) for number in range(rows)])
    assert ((near - keys) ** 2).sum() < 0.2 * (keys**2).sum()
    trained = faiss.read_index(str(made / "knn16.index.trained"))
    assert (trained.ntotal, trained.is_trained) == (0, True)
    info = json.loads((made / "knn16.index.json").read_text())
    assert info["kind"] == "index" and info["entries"] == info["size"] == rows
    assert (info["ncentroids"], info["code_size"], info["seed"], info["pca"]) == (8, 4, 1, 0)
    assert info["datastore"]["rows"] == rows


def test_members(made: Path) -> None:
    """Opened as the original does: unpickled, all rows taken by an index array, then nonzero()."""
    rows = json.loads((made / "dstore16.json").read_text())["rows"]
    with open(made / "kmeans_s1000_k20_members.pkl", "rb") as stream:
        members = pickle.load(stream)
    assert type(members) is scipy.sparse.csr_matrix
    assert members.shape == (20, rows)
    assert (members.data.dtype, members.indices.dtype) == (np.int64, np.int32)
    assert (members.data == 1).all() and members.nnz == rows
    cluster, entry = members[np.arange(members.shape[0])].nonzero()
    assert sorted(entry.tolist()) == list(range(rows))
    assert all((np.diff(part) > 0).all() for part in np.split(members.indices, members.indptr[1:-1]))
    folder = made / "kmeans_s1000_k20_clusters"
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("indptr", "members", "cluster_of")}
    assert [arrays[name].dtype for name in arrays] == [np.int64, np.int32, np.int32]
    np.testing.assert_array_equal(arrays["indptr"], members.indptr)
    np.testing.assert_array_equal(arrays["members"], members.indices)
    np.testing.assert_array_equal(arrays["cluster_of"][entry], cluster)
    info = json.loads((folder / "clusters.json").read_text())
    assert (info["kind"], info["entries"], info["clusters"]) == ("clusters", rows, 20)


def test_nothing_else_is_left(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {
        "dstore16_keys.npy",
        "dstore16_vals.npy",
        "dstore16.json",
        "knn16.index",
        "knn16.index.trained",
        "knn16.index.trained.json",
        "knn16.index.json",
        "kmeans_s1000_k20_members.pkl",
        "kmeans_s1000_k20_members.pkl.json",
        "kmeans_s1000_k20_clusters",
        "results.json",
    }


def test_results(store: Any, made: Path) -> None:
    provenance = {"command", "configuration", "versions", "git_commit", "date", "machine"}
    provenance |= {"peak_memory_bytes", "forced"}
    figures = json.loads((made / "results.json").read_text())
    assert provenance | {"clusters", "entries", "seconds"} == set(figures)
    flags = ["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys", "--context-window", 8]
    figures, _ = store.retrieve(made / "dstore16", made / "knn16.index", *flags)
    assert provenance | {
        "loss_base2",
        "perplexity",
        "unit",
        "count",
        "num_tokens",
        "tokens_per_second",
        "seconds",
        "lm_seconds",
        "retrieval_seconds",
        "context_window",
        "tokens_per_sample",
        "lookups_saved_percent_printed",
        "searches_saved_percent",
        "searches",
    } <= set(figures)
    assert figures["configuration"]["lmbda"] == 0.4
