"""Opening a model folder: configuration, weights, and whether they fit each other and the text."""

from __future__ import annotations

import argparse
import importlib
import logging
import pickle
import re
from typing import Any

from fairseq import training_state
from fairseq.errors import BadFile, BadFlag, MissingDependency
from fairseq.models.huggingface.folders import (
    check_weight_files,
    error_text,
    folder_fingerprint,
    library,
    read_config,
    require_regular_files,
    resolve,
)
from fairseq.models.huggingface.language_model import HuggingFaceDecoder, HuggingFaceLM
from fairseq.models.huggingface.tokenizers import check_same_tokenizer
from fairseq.models.huggingface.weights import refuse_missing_layers, refuse_other_types

logger = logging.getLogger(__name__)

DEVICE_MAPS = re.compile(r"auto|balanced|balanced_low_0|sequential|(cpu|cuda|mps|xpu|npu)(:\d+)?")
REPLACEABLE = ("tokens_per_sample", "knn_keytype")  # by --model-overrides
DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_language_model(
    name: str, dictionary: Any, data: str, args: argparse.Namespace, overrides: dict[str, Any]
) -> tuple[HuggingFaceLM, argparse.Namespace, dict[str, str]]:
    """(model, the options that a checkpoint would hold, digests of its files) of a folder or a name on the Hub.

    dictionary: the ids of the text in the folder `data`; args: eval_lm's flags. UserError where something is missing,
    damaged, or of another tokenizer than the text."""
    folder = resolve(name, "--path")
    config = read_config(folder)
    check_weight_files(folder)
    if not hasattr(dictionary, "tokenizer"):
        remedy = f"preprocess the text with --hf-tokenizer {name}"
        raise BadFile(data, "a text of words (dict.txt)", "one of the model's own tokens", remedy)
    check_same_tokenizer(folder, dictionary, data)
    network = _load(folder, args)
    size = network.get_output_embeddings().weight.shape[0] if network.get_output_embeddings() is not None else None
    if size is not None and len(dictionary) > size:
        found = f"{len(dictionary)} token ids"
        raise BadFile(data, found, f"at most the {size} that the head of {name} has", "use the model's own tokenizer")
    lm = wrapped(network, dictionary, args.knn_keytype, getattr(args, "knn_module", None))
    stored = _options(args, overrides, lm.max_positions(), config)
    return lm, stored, folder_fingerprint(folder)


def wrapped(network: Any, dictionary: Any, key_type: str | None, module: str | None = None) -> HuggingFaceLM:
    """A network of transformers with the methods of our language models. key_type, module: see `Collector`."""
    return HuggingFaceLM(HuggingFaceDecoder(network, dictionary, key_type, module))


def _options(
    args: argparse.Namespace, overrides: dict[str, Any], positions: int, config: dict[str, Any]
) -> argparse.Namespace:
    """What a checkpoint's options would say. Samples have `--tokens-per-sample` tokens after the context window, as far
    as the model's positions reach."""
    tokens, window = args.tokens_per_sample, args.context_window
    wanted = overrides.get("tokens_per_sample", tokens + window)
    if wanted > positions:
        if tokens != 1024 or window >= positions or "tokens_per_sample" in overrides:  # 1024 is the flag's default
            found = f"{wanted - window} tokens after --context-window {window}"
            raise BadFlag("--tokens-per-sample", found, f"{positions} in all: the model has no more positions")
        wanted = positions
        logger.info("--tokens-per-sample: %d, as the model has %d positions", wanted - window, positions)
    return argparse.Namespace(
        tokens_per_sample=wanted, self_target=False, future_target=False, past_target=False, add_bos_token=False,
        train_subset="train", arch=config["model_type"],
    )


def _load(folder: str, args: argparse.Namespace) -> Any:
    """The network with all its weights; UserError when some are missing, of another shape, or not finite."""
    require_regular_files(folder)
    dtype = getattr(args, "hf_dtype", None) or "auto"
    settings: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    if getattr(args, "hf_device_map", None):
        settings["device_map"] = _device_map(args.hf_device_map)
    settings["ignore_mismatched_sizes"] = True  # which are reported below, by name
    try:
        network, info = library().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    except pickle.UnpicklingError:
        found, expected = "a pytorch_model.bin of more than tensors", "tensors alone: code in a file is never run"
        raise BadFile(folder, found, expected, "convert it to model.safetensors where you trust it") from None
    except Exception as error:
        logger.debug("%s: transformers cannot open it", folder, exc_info=True)
        found = f"a model that transformers cannot open ({error_text(error)})"
        raise BadFile(folder, found, "the folder of a causal language model", "check it, or copy it again") from None
    _require_all_weights(folder, info)
    unread = sorted(info.get("unexpected_keys") or ())
    refuse_other_types(folder, network, unread)
    refuse_missing_layers(folder, network, unread)
    if unread:
        logger.warning("%s: %d tensors are no parameters of the model, such as %s", folder, len(unread), unread[0])
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not training_state.is_finite(value):
            raise BadFile(folder, f"numbers that are not finite in {key}", "finite ones", "copy the folder again")
    network.eval()
    return network.requires_grad_(False)


def _require_all_weights(folder: str, info: dict[str, Any]) -> None:
    """BadFile for parameters without weights, or with weights of another shape, by what transformers says of a load."""
    remedy = "check config.json, or copy the folder again"
    if missing := sorted(info["missing_keys"]):
        found = f"no weights for {missing[0]}{_and_more(missing)}"
        raise BadFile(folder, found, "those of all parameters that config.json asks for", remedy)
    if other := sorted(info.get("mismatched_keys") or ()):  # (name, shape in the file, shape in the model)
        name, has, wants = other[0]
        found = f"weights of the shape {_shape(has)} for {name}{_and_more(other)}"
        raise BadFile(folder, found, f"the shape {_shape(wants)} that config.json asks for", remedy)


def _and_more(names: list[Any]) -> str:
    more = len(names) - 1
    return f" (and {more} more {'parameter' if more == 1 else 'parameters'})" if more else ""


def _shape(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def _device_map(name: str) -> str:
    if DEVICE_MAPS.fullmatch(name) is None:
        raise BadFlag("--hf-device-map", name, "auto, balanced, balanced_low_0, sequential, cpu, or cuda:N")
    try:
        importlib.import_module("accelerate")
    except ImportError:
        raise MissingDependency("accelerate", "--hf-device-map", "pip install accelerate") from None
    return name


def check_flags(args: argparse.Namespace) -> None:
    """BadFlag for flags that need a dictionary of words."""
    if args.remove_bpe is not None:
        raise BadFlag(
            "--remove-bpe", args.remove_bpe, "nothing with a Hugging Face model", "word perplexity is given without it"
        )

