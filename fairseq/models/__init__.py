"""Models and the registries behind `--arch`: a model class is registered once; any number of named architectures are
functions that fill in the options which the user left out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq.models.fairseq_decoder import FairseqDecoder, FairseqIncrementalDecoder
from fairseq.models.fairseq_model import ArchitectureMismatch, BaseFairseqModel, FairseqLanguageModel
from fairseq.registry import class_registrar, unknown_name

ArchitectureFunction = Callable[[argparse.Namespace], Any]

MODEL_REGISTRY: dict[str, Any] = {}
register_model = class_registrar("--arch", MODEL_REGISTRY, BaseFairseqModel)  # @register_model("name")
ARCH_MODEL_REGISTRY: dict[str, Any] = {}
ARCH_MODEL_INV_REGISTRY: dict[str, list[str]] = {}
ARCH_CONFIG_REGISTRY: dict[str, ArchitectureFunction] = {}


def build_model(args: argparse.Namespace, task: Any) -> BaseFairseqModel:
    """The model that `args.arch` names, for `task`; BadFlag when no such architecture is registered."""
    arch = getattr(args, "arch", None)
    if arch not in ARCH_MODEL_REGISTRY:
        raise unknown_name("--arch", arch, ARCH_MODEL_REGISTRY)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, task)


def register_model_architecture(
    model_name: str, arch_name: str
) -> Callable[[ArchitectureFunction], ArchitectureFunction]:
    """Function decorator that makes `arch_name` a choice of `--arch`; the function fills its args in place."""

    def decorate(function: ArchitectureFunction) -> ArchitectureFunction:
        if model_name not in MODEL_REGISTRY:
            raise ValueError(f"cannot register the architecture {arch_name}: there is no model named {model_name}")
        if arch_name in ARCH_MODEL_REGISTRY:
            raise ValueError(f"cannot register a second architecture named {arch_name}")
        if not callable(function):
            raise ValueError(f"the architecture {arch_name} must be a function of args")
        ARCH_MODEL_REGISTRY[arch_name] = MODEL_REGISTRY[model_name]
        ARCH_MODEL_INV_REGISTRY.setdefault(model_name, []).append(arch_name)
        ARCH_CONFIG_REGISTRY[arch_name] = function
        return function

    return decorate


from fairseq.models import transformer_lm  # noqa: E402, F401  (fills the registries)

__all__ = [
    "ARCH_CONFIG_REGISTRY",
    "ARCH_MODEL_INV_REGISTRY",
    "ARCH_MODEL_REGISTRY",
    "MODEL_REGISTRY",
    "ArchitectureMismatch",
    "BaseFairseqModel",
    "FairseqDecoder",
    "FairseqIncrementalDecoder",
    "FairseqLanguageModel",
    "build_model",
    "register_model",
    "register_model_architecture",
]
