"""A tiny language model and its text, every file of it written here from the published layouts and not by this
project's writers: what the tests of this folder vary, one format at a time."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

VOCABULARY = 100  # below 128, so that every element type can hold it
WIDTH, FFN, LAYERS, HEADS = 16, 24, 2, 2
OPTIONS = {
    "decoder_layers": LAYERS,
    "decoder_embed_dim": WIDTH,
    "decoder_input_dim": WIDTH,
    "decoder_output_dim": WIDTH,
    "decoder_ffn_embed_dim": FFN,
    "decoder_attention_heads": HEADS,
    "tokens_per_sample": 32,
    "max_target_positions": 32,
    "dropout": 0.1,
}
ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "20,50",
    "adaptive_softmax_cutoff": "20,50",
    "adaptive_input_factor": 4.0,
    "adaptive_softmax_factor": 4.0,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
    "no_decoder_final_norm": True,
}
State = OrderedDict[str, torch.Tensor]


def text_lines(seed: int, count: int) -> list[list[int]]:
    """Lines of token ids, each ending in eos; some are blank. Few words are frequent, so that retrieval finds some."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = 4 + np.minimum(rng.geometric(0.08, rng.integers(0, 14)), VOCABULARY - 5)
        lines.append([*words.tolist(), 2])
    return lines


def write_mmap(prefix: Path, lines: list[list[int]], code: int = 8, dtype: str = "<u2") -> None:
    """The mmap format, field by field."""
    tokens = np.concatenate([np.array(line) for line in lines]).astype(dtype)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<Q", len(lines))
    index += b"".join(struct.pack("<i", len(line)) for line in lines)
    position = 0
    for line in lines:
        index += struct.pack("<q", position)
        position += len(line) * tokens.itemsize
    prefix.with_suffix(".idx").write_bytes(index)


def dictionary_text() -> str:
    """The content of dict.txt: the four specials are not in it."""
    return "".join(f"w{number} {VOCABULARY - number}\n" for number in range(VOCABULARY - 4))


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def layers(generator: torch.Generator) -> State:
    """Parameters of the layers, under fairseq 0.9's names."""
    state: State = OrderedDict()
    for number in range(LAYERS):
        layer = f"decoder.layers.{number}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[f"{layer}self_attn.{part}.weight"] = _random(generator, WIDTH, WIDTH)
            state[f"{layer}self_attn.{part}.bias"] = _random(generator, WIDTH)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{layer}{norm}.weight"] = 1 + _random(generator, WIDTH)
            state[f"{layer}{norm}.bias"] = _random(generator, WIDTH)
        state[f"{layer}fc1.weight"], state[f"{layer}fc1.bias"] = _random(generator, FFN, WIDTH), _random(generator, FFN)
        state[f"{layer}fc2.weight"] = _random(generator, WIDTH, FFN)
        state[f"{layer}fc2.bias"] = _random(generator, WIDTH)
    return state


def plain_state(seed: int = 1, final_norm: bool = True) -> State:
    """A model with a softmax matrix of its own and sinusoidal positions."""
    generator = torch.Generator().manual_seed(seed)
    state: State = OrderedDict({"decoder.version": torch.tensor([3.0])})
    state["decoder.embed_out"] = 3 * _random(generator, VOCABULARY, WIDTH)
    state["decoder.embed_tokens.weight"] = _random(generator, VOCABULARY, WIDTH)
    state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state.update(layers(generator))
    if final_norm:
        state["decoder.layer_norm.weight"] = 1 + _random(generator, WIDTH)
        state["decoder.layer_norm.bias"] = _random(generator, WIDTH)
    return state


def adaptive_state(seed: int = 1) -> State:
    """A model with adaptive input and the adaptive softmax tied to it."""
    generator = torch.Generator().manual_seed(seed)
    state: State = OrderedDict({"decoder.version": torch.tensor([3.0])})
    state["decoder.embed_tokens._float_tensor"] = torch.zeros(1)
    for band, (size, width) in enumerate([(20, 16), (30, 4), (50, 1)]):
        state[f"decoder.embed_tokens.embeddings.{band}.0.weight"] = 2 * _random(generator, size, width)
        state[f"decoder.embed_tokens.embeddings.{band}.1.weight"] = _random(generator, WIDTH, width)
    state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state.update(layers(generator))
    softmax, embeddings = "decoder.adaptive_softmax.", "decoder.embed_tokens.embeddings."
    state[softmax + "version"] = torch.tensor([1])
    state[softmax + "head._float_tensor"] = torch.zeros(1)
    state[softmax + "head.word_proj.weight"] = state[embeddings + "0.0.weight"]
    state[softmax + "head.class_proj.weight"] = _random(generator, 2, WIDTH)
    for tail in (0, 1):
        state[f"{softmax}tail.{tail}.0.weight"] = state[f"{embeddings}{tail + 1}.1.weight"]
        state[f"{softmax}tail.{tail}.2.weight"] = state[f"{embeddings}{tail + 1}.0.weight"]
    return state


def namespace(**options: Any) -> argparse.Namespace:
    """The flat args of a checkpoint of fairseq 0.9."""
    settings = {"arch": "transformer_lm", "task": "language_modeling", "data": "/where/it/was/trained", **OPTIONS}
    return argparse.Namespace(**{**settings, **options})


def nested(arch: str = "transformer_lm", **options: Any) -> dict[str, Any]:
    """The nested configuration of a checkpoint of fairseq 0.12."""
    return {
        "_name": None,
        "common": {"_name": None, "seed": 1, "fp16": True, "log_interval": 100},
        "dataset": {"_name": None, "batch_size": None, "max_tokens": 512},
        "optimization": {"_name": None, "max_update": 10, "lr": [0.0001], "stop_min_lr": 1e-9},
        "checkpoint": {"_name": None, "save_dir": "checkpoints"},
        "eval_lm": {"_name": None, "context_window": 0, "softmax_batch": 9223372036854775807},
        "model": {"_name": arch, **OPTIONS, **options},
        "task": {"_name": "language_modeling", "data": "/where/it/was", "tokens_per_sample": 32},
        "criterion": {"_name": "cross_entropy", "sentence_avg": False},
        "optimizer": {"_name": "nag", "momentum": 0.99, "lr": [0.0001]},
        "lr_scheduler": {"_name": "cosine", "warmup_updates": 0, "min_lr": 0.0001, "lr": [1.0]},
        "bpe": None,
        "tokenizer": None,
        "scoring": {"_name": "bleu"},
    }


def older(state: State, **options: Any) -> dict[str, Any]:
    """The top level of a checkpoint of fairseq 0.9."""
    return {
        "args": namespace(**options),
        "model": state,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqNAG",
                "lr_scheduler_state": {"best": None},
                "num_updates": 600,
            }
        ],
        "extra_state": {"train_iterator": {"epoch": 2, "iterations_in_epoch": 3, "shuffle": True}, "val_loss": 4.5},
    }


def newer(state: State, arch: str = "transformer_lm", **options: Any) -> dict[str, Any]:
    """The top level of a checkpoint of fairseq 0.12: the names of its parameters are the caller's business."""
    content = older(state)
    del content["extra_state"]["train_iterator"]["shuffle"]
    return {**content, "args": None, "cfg": nested(arch, **options), "criterion": None, "task_state": {}}


@dataclass
class World:
    """A folder with `data-bin` (splits train and valid) and ways to use it."""

    folder: Path
    run: Callable[..., Any]

    @property
    def data(self) -> Path:
        return self.folder / "data-bin"

    def save(self, name: str, content: Any, zipped: bool = False, **how: Any) -> Path:
        """A checkpoint file, by torch.save, in PyTorch's older container unless told otherwise."""
        path = self.folder / name
        torch.save(content, path, _use_new_zipfile_serialization=zipped, **how)
        return path

    def evaluate(self, checkpoint: Any, *flags: Any, data: Path | None = None, split: str = "valid") -> Any:
        """Runs eval_lm; returns (figures of its results file, its log)."""
        results = self.folder / "results.json"
        command = [data or self.data, "--path", checkpoint, "--cpu", "--gen-subset", split, "--max-tokens", "256"]
        done = self.run("eval_lm", [*command, "--no-progress-bar", "--results-json", results, *flags])
        assert done.status == 0, done.stderr
        return json.loads(results.read_text()), done.stderr

    def loss(self, checkpoint: Any, *flags: Any, **where: Any) -> float:
        """The loss that eval_lm reports."""
        return self.evaluate(checkpoint, *flags, **where)[0]["loss_base2"]


@pytest.fixture(name="make_world", scope="session")
def make_world_fixture(run_cli: Any) -> Callable[[Path], World]:
    """make_world(folder) writes the data and gives the World in it."""

    def make_world(folder: Path) -> World:
        world = World(folder, run_cli)
        world.data.mkdir()
        (world.data / "dict.txt").write_text(dictionary_text())
        write_mmap(world.data / "train", text_lines(1, 60))
        write_mmap(world.data / "valid", text_lines(2, 20))
        return world

    return make_world


@pytest.fixture(name="world")
def world_fixture(make_world: Any, tmp_path: Path) -> World:
    return make_world(tmp_path)


def members_file(path: Path, assignment: np.ndarray) -> Path:
    """A pickled CSR matrix, clusters x entries, of the cluster of each entry."""
    ones = np.ones(len(assignment), np.int64)
    matrix = scipy.sparse.csr_matrix((ones, (assignment, np.arange(len(assignment)))))
    path.write_bytes(pickle.dumps(matrix))
    return path


@dataclass
class Store:
    """A world with a model and the keys and values of its training text, as arrays: what the tests write to files."""

    world: World
    checkpoint: Path
    keys: np.ndarray
    values: np.ndarray

    @property
    def size(self) -> int:
        return len(self.values)

    def write(self, prefix: Path, value_type: str = "<i8", key_type: str = "<f2", tail: int = 0) -> Path:
        """The raw files: row-major, no header; `tail` zero rows at the end."""
        keys = np.concatenate([self.keys, np.zeros((tail, WIDTH), np.float32)])
        values = np.concatenate([self.values, np.zeros(tail, np.int64)])
        Path(f"{prefix}_keys.npy").write_bytes(keys.astype(key_type).tobytes())
        Path(f"{prefix}_vals.npy").write_bytes(values.astype(value_type).tobytes())
        return prefix

    def retrieve(self, prefix: Any, index: Any, *flags: Any) -> Any:
        """Evaluates with RetoMaton; returns (figures, log)."""
        common = ["--knnlm", "--knn-keytype", "last_ffn_input", "--k", 16, "--lmbda", 0.4, "--probe", 8]
        common += ["--dstore-filename", prefix, "--indexfile", index, "--sample-break-mode", "complete"]
        return self.world.evaluate(self.checkpoint, *common, *flags)

    def loss(self, prefix: Any, index: Any, *flags: Any) -> float:
        """Loss and saved searches must both be right, so both go into the number compared."""
        figures, _ = self.retrieve(prefix, index, *flags)
        assert figures["searches_saved_percent"] > 5
        return figures["loss_base2"] + figures["searches"]


@pytest.fixture(name="store", scope="session")
def store_fixture(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Keys are rounded to half precision, so that files of either precision hold the same numbers."""
    world = make_world(tmp_path_factory.mktemp("store"))
    checkpoint = world.save("plain.pt", older(plain_state()))
    prefix = world.folder / "saved"
    flags = ["--save-knnlm-dstore", "--dstore-mmap", prefix, "--dstore-fp16", "--sample-break-mode", "none"]
    world.evaluate(checkpoint, *flags, split="train")
    values = np.fromfile(f"{prefix}_vals.npy", "<i8")
    keys = np.fromfile(f"{prefix}_keys.npy", "<f2").reshape(len(values), WIDTH).astype(np.float32)
    assert len(values) == sum(map(len, text_lines(1, 60)))
    return Store(world, checkpoint, keys, values)


@pytest.fixture(name="by_hand", scope="session")
def by_hand_fixture() -> Any:
    """The functions above, for the tests: by_hand.plain_state() and so on."""
    return argparse.Namespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
