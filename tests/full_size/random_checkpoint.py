"""Writes a checkpoint of a published model's real shape with random weights, and a little data of its vocabulary size:
`python random_checkpoint.py {wiki103|wmt19} {args|cfg} FOLDER`. Keys and shapes are those of the published files, spelt
out here rather than taken from the model classes. A process of its own, so that the tests' memory stays small.

`args` is fairseq 0.9's layout (flat Namespace, PyTorch's legacy container, optimiser state as half-precision training
leaves it); `cfg` that of 0.12 (nested dict, zip container, renamed output matrix). Weights depend on the seed of each
parameter's name alone, so both layouts hold the same model."""

from __future__ import annotations

import argparse
import struct
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

SHAPES = {
    "wiki103": {"vocabulary": 267_744, "layers": 16, "width": 1024, "ffn": 4096, "parameters": 246_933_504},
    "wmt19": {"vocabulary": 42_024, "layers": 20, "width": 1536, "ffn": 6144, "parameters": 655_841_280},
}
TOKENS_PER_SAMPLE = {"wiki103": 3072, "wmt19": 512}
SPLITS = {"train": 3_600, "valid": 2_000}  # tokens


def tensor(name: str, *shape: int) -> torch.Tensor:
    """Small random numbers that depend on the parameter's name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(2 * shape[-1] ** -0.5)


def layers(count: int, width: int, ffn: int) -> OrderedDict[str, torch.Tensor]:
    """The transformer layers' parameters."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for number in range(count):
        layer = f"decoder.layers.{number}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[f"{layer}self_attn.{part}.weight"] = tensor(f"{number}{part}", width, width)
            state[f"{layer}self_attn.{part}.bias"] = torch.zeros(width)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{layer}{norm}.weight"], state[f"{layer}{norm}.bias"] = torch.ones(width), torch.zeros(width)
        state[f"{layer}fc1.weight"] = tensor(f"{number}fc1", ffn, width)
        state[f"{layer}fc1.bias"] = torch.zeros(ffn)
        state[f"{layer}fc2.weight"] = tensor(f"{number}fc2", width, ffn)
        state[f"{layer}fc2.bias"] = torch.zeros(width)
    return state


def wiki103_state(newer: bool) -> OrderedDict[str, torch.Tensor]:
    """transformer_lm_wiki103: adaptive input, adaptive softmax tied to it; tied tensors are stored under both names."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict({"decoder.version": torch.tensor([3.0])})
    bands = [(20_000, 1024), (40_000, 256), (207_744, 64)]
    tokens, softmax = "decoder.embed_tokens.embeddings.", "decoder.adaptive_softmax."
    state["decoder.embed_tokens._float_tensor"] = torch.zeros(1)
    for band, (size, width) in enumerate(bands):
        state[f"{tokens}{band}.0.weight"] = tensor(f"embedding{band}", size, width)
        state[f"{tokens}{band}.1.weight"] = tensor(f"projection{band}", 1024, width)
    if not newer:
        state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state.update(layers(16, 1024, 4096))
    state[softmax + "version"] = torch.tensor([1])
    state[softmax + "head._float_tensor"] = torch.zeros(1)
    state[softmax + "head.word_proj.weight"] = state[tokens + "0.0.weight"]
    state[softmax + "head.class_proj.weight"] = tensor("classes", 2, 1024)
    for tail in (0, 1):
        state[f"{softmax}tail.{tail}.0.weight"] = state[f"{tokens}{tail + 1}.1.weight"]
        state[f"{softmax}tail.{tail}.2.weight"] = state[f"{tokens}{tail + 1}.0.weight"]
    return state


def wmt19_state(newer: bool) -> OrderedDict[str, torch.Tensor]:
    """The WMT19 news model: embeddings of width 1024 in and out, layers of width 1536, a plain softmax of its own."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict({"decoder.version": torch.tensor([3.0])})
    vocabulary = SHAPES["wmt19"]["vocabulary"]
    state["decoder.embed_tokens.weight"] = tensor("embedding", vocabulary, 1024)
    state["decoder.project_in_dim.weight"] = tensor("in", 1536, 1024)
    if not newer:
        state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    state.update(layers(20, 1536, 6144))
    state["decoder.project_out_dim.weight"] = tensor("out", 1024, 1536)
    output = "decoder.output_projection.weight" if newer else "decoder.embed_out"
    state[output] = tensor("output", vocabulary, 1024)
    return state


OPTIONS = {
    "wiki103": {
        "arch": "transformer_lm_wiki103",
        "criterion": "adaptive_loss",
        "adaptive_input": True,
        "adaptive_input_cutoff": "20000,60000",
        "adaptive_softmax_cutoff": "20000,60000",
        "tie_adaptive_weights": True,
        "tie_adaptive_proj": True,
        "decoder_layers": 16,
        "decoder_embed_dim": 1024,
        "decoder_input_dim": 1024,
        "decoder_output_dim": 1024,
        "decoder_ffn_embed_dim": 4096,
        "decoder_attention_heads": 8,
        "no_decoder_final_norm": True,
    },
    "wmt19": {
        "arch": "transformer_lm_gbw",
        "criterion": "cross_entropy",
        "decoder_layers": 20,
        "decoder_embed_dim": 1536,
        "decoder_input_dim": 1024,
        "decoder_output_dim": 1024,
        "decoder_ffn_embed_dim": 6144,
        "decoder_attention_heads": 16,
        "no_decoder_final_norm": True,
    },
}


def checkpoint(shape: str, newer: bool) -> dict[str, object]:
    """The whole content of the file."""
    model = (wiki103_state if shape == "wiki103" else wmt19_state)(newer)
    options, tokens = dict(OPTIONS[shape]), TOKENS_PER_SAMPLE[shape]
    history = {"criterion_name": "AdaptiveLoss", "optimizer_name": "FP16Optimizer", "num_updates": 286_000}
    content: dict[str, object] = {
        "args": None,
        "model": model,
        "optimizer_history": [{**history, "lr_scheduler_state": {"best": None}}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": np.float64(4.2)},
    }
    if newer:
        arch, criterion = options.pop("arch"), options.pop("criterion")
        content["cfg"] = {
            "model": {"_name": arch, **options, "tokens_per_sample": tokens, "max_target_positions": tokens},
            "task": {"_name": "language_modeling", "data": "/elsewhere", "tokens_per_sample": tokens},
            "criterion": {"_name": criterion},
        }
        return content
    content["args"] = argparse.Namespace(
        task="language_modeling", data="/elsewhere", tokens_per_sample=tokens, max_target_positions=tokens, **options
    )
    if shape == "wiki103":  # trained in half precision: one float32 vector for all parameters; the other was stripped
        momentum = torch.zeros(SHAPES[shape]["parameters"])
        optimizer = {"state": {0: {"momentum_buffer": momentum}}, "param_groups": [{"params": [0]}]}
        content["last_optimizer_state"] = optimizer
    return content


def write_data(folder: Path, vocabulary: int) -> None:
    """dict.txt and two short splits in the mmap format, lines of 24 words drawn by Zipf's law (word n as often as
    1 / n, and so four of five from the first 20,000) and an end of sentence."""
    folder.mkdir(parents=True)
    (folder / "dict.txt").write_text("".join(f"w{number} 1\n" for number in range(vocabulary - 4)))
    rng = np.random.default_rng(1)
    code, dtype = (8, "<u2") if vocabulary < 65_500 else (4, "<i4")
    for split, count in SPLITS.items():
        words = np.exp(rng.uniform(0, np.log(vocabulary - 3), (count // 25, 25)))  # from 1 to vocabulary - 4
        lines = (words.astype(np.int64) + 3).astype(dtype)
        lines[:, -1] = 2
        (folder / f"{split}.bin").write_bytes(lines.tobytes())
        with open(folder / f"{split}.idx", "wb") as stream:
            stream.write(struct.pack("<9sQBQ", b"MMIDIDX\0\0", 1, code, len(lines)))
            stream.write(np.full(len(lines), 25, "<i4").tobytes())
            stream.write((np.arange(len(lines), dtype="<i8") * 25 * lines.itemsize).tobytes())


def main() -> None:
    """Writes FOLDER/checkpoint.pt and FOLDER/data-bin."""
    shape, layout, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    write_data(folder / "data-bin", SHAPES[shape]["vocabulary"])
    newer = layout == "cfg"
    torch.save(checkpoint(shape, newer), folder / "checkpoint.pt", _use_new_zipfile_serialization=newer)


if __name__ == "__main__":
    main()
