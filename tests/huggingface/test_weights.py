"""Weights of a model folder that do not belong to the model as it is: tensors of other types than its parameters, and
layers that it does not have; and what real models have besides, which does no harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

QUIET = ["--no-progress-bar", "--cpu", "--gen-subset", "valid"]
Change = Callable[[dict[str, Any]], Any]
WEIGHTS = {"gpt2": "transformer.h.0.mlp.c_fc.weight", "llama": "model.layers.0.mlp.up_proj.weight"}


@pytest.fixture
def changed(golden_hf: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed(model, change, container, **config): a copy whose tensors `change` has edited in place."""

    def make(model: str, change: Change, container: str = "model.safetensors", **config: Any) -> Path:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "model"
        shutil.copytree(golden_hf / model, folder)
        for path in folder.iterdir():
            path.chmod(0o644)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        change(tensors)
        if container == "shards":
            for name, part in zip(("a", "b"), (sorted(tensors)[::2], sorted(tensors)[1::2])):
                save_file({key: tensors[key] for key in part}, folder / f"{name}.safetensors", {"format": "pt"})
            places = {key: f"{'ab'[k % 2]}.safetensors" for k, key in enumerate(sorted(tensors))}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        elif container.endswith("bin"):
            torch.save(tensors, folder / container)
        elif container == "old archive":
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        else:
            save_file(tensors, folder / container, {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **config}))
        return folder

    return make


def as_type(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: (tensors[name] * 8).to(dtype)})


INTEGERS = [torch.int32, torch.int64, torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64]


@pytest.mark.parametrize(
    "model, dtype, container",
    [
        *(("gpt2", dtype, "model.safetensors") for dtype in INTEGERS),
        *(("gpt2", torch.int32, container) for container in ("shards", "pytorch_model.bin", "old archive")),
        ("llama", torch.int32, "model.safetensors"),
        ("llama", torch.bool, "pytorch_model.bin"),
    ],
)
def test_types_that_are_not_floating_point(
    model: str, dtype: torch.dtype, container: str, changed: Any, binarised: Any, golden_hf: Path, run_cli: Any
) -> None:
    folder = changed(model, as_type(WEIGHTS[model], dtype), container)
    done = run_cli("eval_lm", [binarised(golden_hf / model), "--path", folder, *QUIET])
    assert f"of {WEIGHTS[model]}, expected floating-point numbers" in done.error


@pytest.mark.parametrize("name", ["wte.weight", "h.1.attn.c_attn.bias", "ln_f.bias"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_any_parameter(
    name: str, prefix: str, changed: Any, binarised: Any, golden_hf: Path, run_cli: Any
) -> None:
    """Embeddings, biases and norms, also under the names without a prefix that the first GPT-2 files have."""

    def change(tensors: dict[str, Any]) -> None:
        as_type(f"transformer.{name}", torch.int32)(tensors)
        for key in list(tensors):
            tensors[key.replace("transformer.", prefix, 1)] = tensors.pop(key)

    done = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", changed("gpt2", change), *QUIET])
    assert f"{name}, expected" in done.error and "expected floating-point numbers" in done.error


def with_buffers(tensors: dict[str, Any]) -> None:
    """What files of GPT-2 and of older Llama models hold beside the parameters."""
    layers = {name.rpartition(".mlp.")[0] for name in tensors if ".mlp." in name}
    for layer in layers:
        attention = "attn" if ".h." in layer else "self_attn"
        tensors[f"{layer}.{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"{layer}.{attention}.masked_bias"] = torch.tensor(-1e4)
        tensors[f"{layer}.{attention}.rotary_emb.inv_freq"] = torch.ones(4)
        tensors[f"{layer}.position_ids"] = torch.arange(8)


def in_double(tensors: dict[str, Any]) -> None:
    tensors.update({name: value.double() for name, value in tensors.items()})


@pytest.mark.parametrize("change", [with_buffers, in_double])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_what_does_no_harm(
    change: Any, model: str, changed: Any, binarised: Any, golden_hf: Path, evaluate: Any
) -> None:
    data = binarised(golden_hf / model)
    flags = ["--gen-subset", "valid", "--hf-dtype", "float32"]
    assert evaluate(data, changed(model, change), *flags)["loss_base2"] == pytest.approx(
        evaluate(data, golden_hf / model, *flags)["loss_base2"], abs=1e-6
    )


@pytest.mark.parametrize("model, setting", [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
@pytest.mark.parametrize("prefixed", [True, False])
def test_layers_that_the_configuration_leaves_out(
    model: str, setting: str, prefixed: bool, changed: Any, binarised: Any, golden_hf: Path, run_cli: Any
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [] if prefixed or model != "gpt2" else list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = changed(model, change, **{setting: 1})
    command = [binarised(golden_hf / model), "--path", folder, *QUIET]
    done = run_cli("eval_lm", command)
    assert "found weights of" in done.error and ".1 (" in done.error and "expected 1 in" in done.error
    forced = run_cli("eval_lm", [*command, "--force"])
    assert forced.status == 0 and "Perplexity" in forced.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_in_place_of_a_file(name: str, changed: Any, binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    folder = changed("gpt2", lambda tensors: None)
    (folder / name).unlink()
    (folder / name).mkdir()
    done = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", folder, *QUIET])
    assert f"{name}: found a folder, expected a file" in done.error
