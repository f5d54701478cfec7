"""Reading checkpoints with flat `args` (fairseq 0.9 and this package) and with nested `cfg` (0.10 and later), in
PyTorch's legacy and zip containers, without executing code in the file. Writing is in `fairseq.checkpoint_saving`,
re-exported here under fairseq's names."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import logging
import mmap as mmap_module
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fairseq import training_state
from fairseq.errors import BadFile, BadFlag, MissingFile, UserError
from fairseq.files import safe_pickle, torch_files
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, ArchitectureMismatch
from fairseq.option_checks import actions_of, expected_instead, old_options
from fairseq.registry import REGISTRIES, declared_defaults, is_built_in, set_defaults

logger = logging.getLogger(__name__)

SAVING = ("save_checkpoint", "load_checkpoint", "verify_checkpoint_directory", "torch_persistent_save", "save_state")
CONTENT = "a checkpoint written by this package or fairseq"


def load_checkpoint_to_cpu(
    path: str | os.PathLike[str], arg_overrides: dict[str, Any] | None = None, mmap: bool = False
) -> dict[str, Any]:
    """The checkpoint's dict with tensors on the CPU, upgraded to the current layout; `args` is a flat Namespace.

    arg_overrides: set on `args` before missing options are filled in; mmap: for callers that copy the tensors they need
    and drop the others, see `read_torch_file`."""
    state = read_torch_file(path, mmap)
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("model"), dict)
        or not (isinstance(state.get("args"), argparse.Namespace) or isinstance(state.get("cfg"), dict))
    ):
        raise BadFile(path, "no model with its options", CONTENT)
    with safe_pickle.pickle_errors(path, CONTENT):
        return upgrade_state(state, arg_overrides)


def read_torch_file(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """Reads a file of `torch.save`, by the allow-list of `fairseq.files.safe_pickle`.

    With `mmap` the tensors of a zip container are memory-mapped. This is cheap for a caller that needs only some of
    them, but the process may crash if the file is overwritten while they are in use."""
    return torch_files.read_torch_file(path, CONTENT, mmap)


# ---------------------------------------------------------------------------------------------------------------------
# Upgrades

# If two groups have an option of the same name, the value of the later group in this order is used.
CFG_GROUPS = (  # noqa: SIM905
    "model task criterion optimizer lr_scheduler tokenizer bpe scoring optimization dataset checkpoint common "
    "distributed_training common_eval eval_lm generation interactive bmuf ema"
).split()
CFG_CHOICES = ("task", "criterion", "optimizer", "lr_scheduler", "tokenizer", "bpe")
CFG_RENAMED = {
    "batch_size": "max_sentences",
    "batch_size_valid": "max_sentences_valid",
    "stop_min_lr": "min_lr",
    "post_process": "remove_bpe",
}
RANDOM_FILLS = ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_")
CFG_BACKENDS = {"pytorch_ddp": "c10d", "legacy_ddp": "no_c10d"}


def flatten_cfg(cfg: dict[str, Any]) -> argparse.Namespace:
    """One flat Namespace from the nested configuration of fairseq 0.10 and later, under the older option names."""
    flat: dict[str, Any] = {}
    groups = [group for group in CFG_GROUPS if group in cfg] + [group for group in cfg if group not in CFG_GROUPS]
    for group in groups:
        values = cfg[group]
        if isinstance(values, dict):
            for key, value in values.items():
                if not key.startswith("_"):
                    flat.setdefault(key, value)
        elif isinstance(values, argparse.Namespace):  # 0.10 kept some components' options as a Namespace
            for key, value in vars(values).items():
                flat.setdefault(key, value)
    flat["arch"] = _component_name(cfg.get("model")) or flat.get("arch")
    for choice in CFG_CHOICES:
        flat[choice] = _component_name(cfg.get(choice))
    for new, old in CFG_RENAMED.items():
        if new in flat:
            flat.setdefault(old, flat[new])
    flat["ddp_backend"] = CFG_BACKENDS.get(flat.get("ddp_backend", "c10d"), flat.get("ddp_backend", "c10d"))
    if flat.get("shorten_method") == "truncate":
        flat.setdefault("truncate_sequence", True)
    if isinstance(flat.get("data"), list):
        flat["data"] = os.pathsep.join(flat["data"])
    return argparse.Namespace(**flat)


def _component_name(component: Any) -> str | None:
    if isinstance(component, str):
        return component
    if isinstance(component, dict):
        return component.get("_name")
    for attribute in ("_name", "arch"):
        if hasattr(component, attribute):
            return getattr(component, attribute)
    return None


def upgrade_state(state: dict[str, Any], arg_overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Upgrades a checkpoint's dict to the current layout in place, with `arg_overrides` applied to its args."""
    args = state.get("args")
    if args is None:
        args = flatten_cfg(state["cfg"])
    state["args"] = args
    state["stored_options"] = sorted(vars(args))
    for key, value in (arg_overrides or {}).items():
        setattr(args, key, value)
    _upgrade_training_state(state)
    _upgrade_args(args)
    return state


def _upgrade_training_state(state: dict[str, Any]) -> None:
    """Moves optimizer history and iterator position of files of 2017 and later to their current places."""
    state.setdefault("extra_state", {})
    extra = state["extra_state"]
    if "optimizer_history" not in state:
        entry = {"criterion_name": "CrossEntropyCriterion", "best_loss": state.pop("best_loss", None)}
        state["optimizer_history"] = [entry]
        if "optimizer" in state:
            state["last_optimizer_state"] = state.pop("optimizer")
    for key in ("epoch", "batch_offset", "val_loss"):
        if key in state:
            extra.setdefault(key, state.pop(key))
    history = state["optimizer_history"]
    if history and "optimizer" in history[-1]:
        state["last_optimizer_state"] = history[-1]["optimizer"]
    for entry in history:
        entry.pop("optimizer", None)
        entry.setdefault("optimizer_name", "FairseqNAG")
        if "lr_scheduler_state" not in entry:
            entry["lr_scheduler_state"] = {"best": entry.pop("best_loss", None)}
        entry.setdefault("num_updates", 0)
    if "train_iterator" not in extra:
        position = {"epoch": extra.get("epoch", 0), "iterations_in_epoch": extra.get("batch_offset") or 0}
        extra["train_iterator"] = position


def _upgrade_args(args: argparse.Namespace) -> None:
    """Renames options, then fills in the declared defaults of options that the file lacks."""
    if hasattr(args, "max_positions") and not hasattr(args, "max_source_positions"):
        args.max_source_positions = args.max_target_positions = args.max_positions
    if not hasattr(args, "task"):
        args.task = "translation"
    if getattr(args, "raw_text", False):
        args.dataset_impl = "raw"
    elif getattr(args, "lazy_load", False):
        args.dataset_impl = "lazy"
    _fill_defaults(args)


def _fill_defaults(args: argparse.Namespace) -> None:
    """Sets options that the chosen task, model and registry classes declare with a default; never overwrites."""
    # imported here, as user code may import this module from any of them
    from fairseq import criterions, optim, tasks  # noqa: F401  (importing fills the registries)
    from fairseq.optim import lr_scheduler  # noqa: F401

    if args.task in tasks.TASK_REGISTRY:
        set_defaults(args, tasks.TASK_REGISTRY[args.task])
    if getattr(args, "arch", None) in ARCH_MODEL_REGISTRY:
        set_defaults(args, ARCH_MODEL_REGISTRY[args.arch])
    for name, registry in REGISTRIES.items():
        choice = getattr(args, name, None)
        if isinstance(choice, str) and choice in registry.classes:
            set_defaults(args, registry.classes[choice])


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model_ensemble(
    filenames: Sequence[str], arg_overrides: dict[str, Any] | None = None, task: Any = None
) -> tuple[list[Any], argparse.Namespace]:
    """(models, args of the last) for checkpoint files; see `load_model_ensemble_and_task`."""
    models, args, _ = load_model_ensemble_and_task(filenames, arg_overrides, task)
    return models, args


def load_model_ensemble_and_task(
    filenames: Sequence[str], arg_overrides: dict[str, Any] | None = None, task: Any = None
) -> tuple[list[Any], argparse.Namespace, Any]:
    """(models, args of the last, task). The models share one task, made from the first file's args when None is given.

    UserError for a missing file, an unknown architecture, or parameters that do not fit the dictionary."""
    if not filenames:
        raise UserError("--path: found no checkpoint, expected at least one file")
    models, args, _, task = load_ensemble(filenames, arg_overrides, task)
    return models, args[-1], task


def load_ensemble(
    filenames: Sequence[str], arg_overrides: dict[str, Any] | None = None, task: Any = None
) -> tuple[list[Any], list[argparse.Namespace], set[str], Any]:
    """As `load_model_ensemble_and_task`, with the args of each model, which may have other sizes, and the names of the
    options that the files hold themselves."""
    from fairseq import tasks

    models, all_args, stored = [], [], set()
    for filename in filenames:
        if not os.path.exists(filename):
            raise MissingFile(filename, "check --path")
        state = load_checkpoint_to_cpu(filename, arg_overrides, mmap=True)
        args, parameters = state["args"], state["model"]
        check_options(filename, args, arg_overrides)
        if kept := getattr(args, "decoder_layers_to_keep", None):
            logger.warning("%s: only the layers %s are used, as its options or the overrides say", filename, kept)
        all_args.append(args)
        stored.update(state["stored_options"])
        del state  # the optimizer's part is as large as the weights, or larger
        if torch_files.can_be_mapped(filename, CONTENT):
            parameters = _unmapped(parameters, torch_files.StorageCheck(filename, CONTENT))
        if task is None:
            task = tasks.setup_task(args)
        models.append(_build_and_load(filename, args, task, parameters))
    return models, all_args, stored, task


def check_options(filename: str, args: argparse.Namespace, overrides: dict[str, Any] | None = None) -> None:
    """BadFile when an option in `args` that building the model or the task reads is nothing that its flag could have
    given; BadFlag when it is one of `overrides`."""
    from fairseq import tasks

    arch, task = getattr(args, "arch", None), getattr(args, "task", None)
    classes: list[Any] = []
    required: dict[str, Any] = {}
    if isinstance(task, str) and task in tasks.TASK_REGISTRY:
        classes.append(tasks.TASK_REGISTRY[task])
        required |= declared_defaults(tasks.TASK_REGISTRY[task])
    if isinstance(arch, str) and arch in ARCH_MODEL_REGISTRY:
        classes.append(ARCH_MODEL_REGISTRY[arch])
        if _is_own(args):
            required |= vars(_architecture_defaults(arch))
    for name, action in (old_options() | actions_of(classes)).items():
        value = getattr(args, name, None)
        expected = expected_instead(action, value)
        if value is None and hasattr(args, name) and required.get(name) is not None:
            expected = f"a value, such as {required[name]!r:.80}"
        if expected is None:
            continue
        found = f"{name} {value!r:.80}"
        if name in (overrides or {}):
            raise BadFlag("the overrides of the model's options", found, expected)
        remedy = "set another by --model-overrides, or copy the file again"
        raise BadFile(filename, f"the option {found}", expected, remedy)


def _architecture_defaults(arch: str) -> argparse.Namespace:
    defaults = argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](defaults)
    return defaults


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Digest (BLAKE2b, 128 bits) of a model's weights, tied ones once: the same for every file that holds them."""
    digest, seen = hashlib.blake2b(digest_size=16), set()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unmapped(parameters: dict[str, Any], check: torch_files.StorageCheck) -> dict[str, Any]:
    """Copies of the tensors of a memory-mapped file, each checked; tied tensors stay tied. The pages of each tensor are
    released once it is copied, because they would count as this process's memory, in addition to the copies."""
    copies: dict[Any, torch.Tensor] = {}
    result = {}
    for name, value in parameters.items():
        if isinstance(value, torch.Tensor):
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if place not in copies:
                check(value)
                copies[place] = value.clone()
                _forget_pages(value)
            value = copies[place]
        result[name] = value
    return result


def _forget_pages(tensor: torch.Tensor) -> None:
    """Tells Linux that the pages under a tensor of a memory-mapped file are not needed; they can be read again
    later."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap_module.PAGESIZE
    start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    length = end - start
    if tensor.is_contiguous() and length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap_module.MADV_DONTNEED)


def _build_and_load(filename: str, args: argparse.Namespace, task: Any, parameters: dict[str, Any]) -> Any:
    """A model with the file's parameters; built on the meta device, without memory, where its class allows that."""
    own = _is_own(args)
    check_parameters(filename, args, parameters)
    try:
        try:
            with torch.device("meta"), _NoRandomValues():
                model = task.build_model(args)
            model.load_state_dict(parameters, strict=True, args=args)
            if not _has_meta_tensors(model):
                return model
        except (NotImplementedError, RuntimeError) as error:  # a user's model may compute when it is built
            if own:  # ours do not: in memory, sizes that fail here would fail too, or fill it first
                raise
            logger.debug("%s: building the model on the meta device failed (%s)", filename, error)
        model = task.build_model(args)
        model.load_state_dict(parameters, strict=True, args=args)
        return model
    except ArchitectureMismatch as error:
        raise ArchitectureMismatch(f"{filename}: {error}") from error
    except (BadFile, BadFlag, MissingFile):
        raise
    except UserError as error:  # of a layer, which does not know the file
        raise UserError(f"{filename}: {error}") from error
    except Exception as error:
        logger.debug("%s: the model cannot be built", filename, exc_info=True)
        detail = (str(error).splitlines() or [""])[0][:160]
        found = f"options that make no model ({type(error).__name__}: {detail})"
        remedy = "check the file, --model-overrides and --user-dir"
        raise BadFile(filename, found, "those of a trained model", remedy) from error


class _NoRandomValues(TorchFunctionMode):
    """Leaves out the initial values of parameters that have no memory: to draw them, torch would import its compiler,
    which takes longer than everything else that a small evaluation imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor", args[0] if args else None)
        if getattr(func, "__name__", "") in RANDOM_FILLS and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def _is_own(args: argparse.Namespace) -> bool:
    """Whether the architecture is one of this package, not of `--user-dir`."""
    return is_built_in(ARCH_MODEL_REGISTRY.get(str(getattr(args, "arch", ""))))


def check_parameters(filename: str, args: argparse.Namespace, parameters: Any) -> None:
    """BadFile when parameters are not tensors, too few for the number of layers in the options, or not finite."""
    if not isinstance(parameters, dict):
        raise BadFile(filename, f"{type(parameters).__name__} instead of parameters", "a tensor for each name")
    own = _is_own(args)
    for name, value in parameters.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise BadFile(filename, f"{type(value).__name__} as the parameter {str(name)[:80]!r}", "a tensor")
        if own and not name.endswith("version") and not value.is_floating_point():
            found = f"{str(value.dtype).removeprefix('torch.')} numbers in {name[:80]}"
            raise BadFile(filename, found, "floating-point numbers", "use what training saved")
        # the buffers named so are memory that fairseq never set; a user's model may keep a mask of infinities
        if own and not name.endswith("_float_tensor") and not training_state.is_finite(value):
            remedy = "copy the file again, or use an earlier checkpoint"
            raise BadFile(filename, f"numbers that are not finite in {name[:80]}", "finite ones", remedy)
    layers = getattr(args, "decoder_layers", 0)
    if own and parameters and isinstance(layers, int) and layers > len(parameters):
        found = f"{layers} decoder layers but {len(parameters)} parameters"
        raise BadFile(filename, found, "parameters of every layer")


def _has_meta_tensors(model: torch.nn.Module) -> bool:
    """Whether a parameter, buffer or plain tensor attribute is still without values."""
    for module in model.modules():
        for values in (vars(module), module._parameters, module._buffers):
            if any(isinstance(value, torch.Tensor) and value.is_meta for value in values.values()):
                return True
    return False


def checkpoint_paths(path: str, pattern: str = r"checkpoint(\d+)\.pt") -> list[str]:
    """Files in the folder `path` whose whole name matches `pattern`, by its first group (a number), largest first."""
    matcher = re.compile(pattern)
    found = []
    for number, name in enumerate(sorted(os.listdir(path))):
        match = matcher.fullmatch(name)
        if match is not None:
            found.append((float(match.group(1)) if match.groups() else number, name))
    return [os.path.join(path, name) for _, name in sorted(found, reverse=True)]


def __getattr__(name: str) -> Any:
    """`save_checkpoint` and its like: written in `fairseq.checkpoint_saving`, found here by code made for fairseq."""
    if name in SAVING:
        return getattr(importlib.import_module("fairseq.checkpoint_saving"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
