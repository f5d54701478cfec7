"""Model folders: a local one, or the local copy of one on the Hugging Face Hub; what is in it, and what is refused."""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
from typing import Any

from fairseq.errors import BadFile, MissingDependency, MissingFile, UserError
from fairseq.files.atomic_io import read_json
from fairseq.files.fingerprint import file_fingerprint
from fairseq.files.inputs import open_input, regular_size

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIG = "config.json"
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
EXTRA = "pip install -c constraints.txt --editable '.[hf]'"


def library(name: str = "transformers") -> Any:
    """transformers, or another library of the extra `hf`; UserError with the command that installs it."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise MissingDependency(name, "a Hugging Face model", EXTRA) from None
    if name == "transformers":
        module.logging.set_verbosity_error()
        module.logging.disable_progress_bar()
    return module


def is_model_name(path: str) -> bool:
    """Whether `path` is a folder, or a name on the Hub (`organisation/model`) and nothing that could be a file."""
    if os.path.exists(path):
        return os.path.isdir(path)
    return HUB_NAME.fullmatch(path) is not None and not path.endswith(".pt") and not os.path.isdir(path.split("/")[0])


def resolve(name: str, flag: str, weights: bool = True) -> str:
    """The local folder of `name`: itself, or a downloaded copy (from the cache alone where HF_HUB_OFFLINE=1 is set).

    weights: whether the model's weights are wanted too. UserError where it cannot be had."""
    if os.path.isdir(name):
        return name
    if not is_model_name(name):
        raise MissingFile(name, f"give {flag} a folder with {CONFIG}, or a Hub name such as HuggingFaceTB/SmolLM2-135M")
    hub = library("huggingface_hub")
    try:
        folder = hub.snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, *WEIGHTS[:weights]])
        if weights and not weight_files(folder):
            folder = hub.snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, *WEIGHTS])
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        remedy = "check the name and the network, or give a local folder"
        raise UserError(f"{flag}: {name} is no folder here and cannot be had from the Hub ({said}); {remedy}") from None
    return str(folder)


def weight_files(folder: str) -> list[str]:
    """The safetensors files of a folder, else its `pytorch_model.bin` files."""
    for pattern in WEIGHTS:
        if found := sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            return found
    return []


def require_regular_files(folder: str) -> None:
    """BadFile for a FIFO, socket or device in a folder that transformers is to open: reading it might never end."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and os.path.exists(entry.path):
                regular_size(entry.path)


def require_no_folder(path: str) -> None:
    """BadFile for a folder where a file is expected: it is not the same as a missing file."""
    if os.path.isdir(path):
        raise BadFile(path, "a folder", "a file", "copy the model's folder again")


def check_weight_files(folder: str) -> None:
    """BadFile or MissingFile unless there are weights, and all files that their index names."""
    if not weight_files(folder):
        raise BadFile(folder, "no weights", "model.safetensors or pytorch_model.bin", "copy the folder again")
    for path in weight_files(folder):
        require_no_folder(path)
    for path in glob.glob(os.path.join(glob.escape(folder), "*.index.json")):
        content = read_json(path)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise BadFile(path, "no weight_map", "the names of the files of weights", "copy the folder again")
        for name in sorted(set(places.values())):
            if not os.path.isfile(os.path.join(folder, name)):
                raise MissingFile(os.path.join(folder, name), f"{path} names it: copy the folder again")


def read_config(folder: str) -> dict[str, Any]:
    """What config.json says; MissingFile or BadFile unless it describes a model that transformers knows by itself."""
    path = os.path.join(folder, CONFIG)
    require_no_folder(path)
    try:
        needed = f"it needs {CONFIG}, model.safetensors and tokenizer.json"
        with open_input(path, f"{folder} is no model folder: {needed}") as stream:
            config = json.loads(stream.read().decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise BadFile(path, "no JSON in UTF-8", "the configuration of a model", "copy the folder again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise BadFile(path, "no model_type", "the configuration of a model", "copy the folder again")
    if kind not in library().models.auto.configuration_auto.CONFIG_MAPPING:
        found, remedy = f"the model type {kind}", "check the name, or update transformers"
        if config.get("auto_map"):
            found += ", which needs code of its folder"
            remedy = "such code is never run (trust_remote_code stays off); use a model of the library"
        raise BadFile(path, found, "one that transformers has", remedy)
    if kind not in library().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        expected = "that of a causal language model"
        raise BadFile(path, f"the model type {kind}", expected, "give the folder of a causal language model")
    require_usable_config(folder)
    return config


def require_usable_config(folder: str) -> None:
    """BadFile where transformers cannot make a configuration of config.json: values of other types, names that it does
    not know. The tokenizer and the model read it too, and would be blamed."""
    try:
        library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        found = f"a configuration that transformers cannot use ({error_text(error)})"
        remedy = "correct it, or copy the folder again"
        raise BadFile(os.path.join(folder, CONFIG), found, "values of the types that the model has", remedy) from None


def error_text(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, on one line and not too long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= most else text[: most - 3] + '...'}"


def folder_fingerprint(folder: str) -> dict[str, str]:
    """Digests of the configuration and of the weights, by file name."""
    files = [os.path.join(folder, CONFIG), *weight_files(folder)]
    return {os.path.basename(path): file_fingerprint(path) for path in files}
