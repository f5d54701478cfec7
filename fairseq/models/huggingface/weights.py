"""What the files of weights hold, compared with the model that transformers made of them: it casts tensors of every
type, and leaves out those that the configuration has no place for."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from typing import Any

import torch

from fairseq.errors import BadFile
from fairseq.files.atomic_io import read_json
from fairseq.models.huggingface.folders import library, weight_files
from fairseq.refusals import refuse

SINGLE = ("model.safetensors", "pytorch_model.bin")
FLOATING = ("F", "BF")  # how safetensors' names of floating-point types begin


def refuse_other_types(folder: str, network: Any, unread: Iterable[str]) -> None:
    """BadFile for a tensor that is not floating point where the model's parameter is: casting it would change numbers
    unseen. unread: names of tensors that the model has no use for. Quantised models have types of their own."""
    if getattr(network, "hf_quantizer", None) is not None:
        return
    floating = [name for name, value in network.state_dict().items() if value.is_floating_point()]
    buffers, ignored = [name for name, _ in network.named_buffers()], set(unread)
    patterns = [*(network._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    for name, kind in _other_types(folder).items():
        if not any(_same(name, own) for own in floating) and (  # what else is not a weight under another name
            name in ignored
            or any(_same(name, own) for own in buffers)
            or any(re.search(pattern, name) for pattern in patterns)
        ):
            continue
        found, remedy = f"the type {kind} of {name}", "save the weights again as the model's own type"
        raise BadFile(folder, found, "floating-point numbers, as the model's parameter is", remedy)


def refuse_missing_layers(folder: str, network: Any, unread: Iterable[str]) -> None:
    """Refuses weights of layers that the model does not have, as its configuration says that there are fewer."""
    lists = {name: len(module) for name, module in network.named_modules() if isinstance(module, torch.nn.ModuleList)}
    for name in unread:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            before = name[: number.start() - 1]
            for own, length in lists.items():
                if _same(before, own) and int(number.group()) >= length:
                    found = f"weights of {name[: number.end()]} ({name}), which the model does not have"
                    expected = f"{length} in {own}, as the configuration says"
                    remedy = "check config.json, copy the folder again, or go on with --force"
                    refuse(BadFile(folder, found, expected, remedy))
                    return


def _same(name: str, own: str) -> bool:
    """Whether two names differ at most by a prefix, such as `transformer.`."""
    return name == own or own.endswith("." + name) or name.endswith("." + own)


def _other_types(folder: str) -> dict[str, str]:
    """The types of the tensors that are not floating point, by name. No tensor is read."""
    found: dict[str, str] = {}
    for path in _files_read(folder):
        if path.endswith(".safetensors"):
            with library("safetensors").safe_open(path, "pt") as file:
                names = file.keys()
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
            found |= {name: kind for name, kind in kinds.items() if not kind.startswith(FLOATING)}
        else:
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="meta", weights_only=True, mmap=mapped)
            tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
            found |= {
                name: str(value.dtype).removeprefix("torch.")
                for name, value in tensors.items()
                if not value.is_floating_point()
            }
    return found


def _files_read(folder: str) -> list[str]:
    """The files that transformers reads: the one of the usual name, or those of the index; else all there are."""
    for name in SINGLE:
        if os.path.isfile(path := os.path.join(folder, name)):
            return [path]
        if os.path.isfile(index := f"{path}.index.json"):
            return sorted({os.path.join(folder, part) for part in read_json(index)["weight_map"].values()})
    return weight_files(folder)
