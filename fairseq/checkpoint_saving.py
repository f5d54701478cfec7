"""Writing checkpoints and restoring a training run from them: contents, names and conditions of fairseq 0.9, so that
0.9 to 0.12 can read the files strictly. Files are written atomically; further names of the same state are hard links,
or copies where the file system has no hard links."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import shutil
import tempfile
import time
from typing import Any

import torch

from fairseq import distributed_utils
from fairseq.errors import UserError
from fairseq.files.atomic_io import atomic_write, discard, leftovers, publish, temporary_path, torch_writing
from fairseq.files.folders import make_folder
from fairseq.flag_types import literal_dict

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
# The flags that decide which samples are in the batches of an epoch, and in what order.
BATCHING = (  # noqa: SIM905
    "max_tokens max_sentences required_batch_size_multiple seed tokens_per_sample sample_break_mode "
    "max_target_positions train_subset add_bos_token distributed_world_size"
).split()
SAFE_POINT_SECONDS = 60.0
SAFE_POINT_SHARE = 20  # safe points are at least this many times further apart than one takes to write


# ---------------------------------------------------------------------------------------------------------------------
# Contents


def save_state(
    filename: str,
    args: argparse.Namespace,
    model_state_dict: dict[str, Any],
    criterion: Any,
    optimizer: Any,
    lr_scheduler: Any,
    num_updates: int,
    optim_history: list[dict[str, Any]] | None = None,
    extra_state: dict[str, Any] | None = None,
) -> None:
    """Writes one checkpoint. Weights keep their type, the optimiser's tensors become float32, all go to the CPU."""
    entry = {
        "criterion_name": type(criterion).__name__,
        "optimizer_name": type(optimizer).__name__,
        "lr_scheduler_state": lr_scheduler.state_dict(),
        "num_updates": num_updates,
    }
    state: dict[str, Any] = {
        "args": args,
        "model": to_cpu(model_state_dict),
        "optimizer_history": [*(optim_history or []), entry],
        "extra_state": extra_state or {},
    }
    criterion_state = criterion.state_dict()
    if criterion_state:
        state["criterion"] = to_cpu(criterion_state)
    if not args.no_save_optimizer_state:
        state["last_optimizer_state"] = to_cpu(optimizer.state_dict(), dtype=torch.float32)
    torch_persistent_save(state, filename)


def torch_persistent_save(content: Any, filename: str) -> None:
    """`torch.save` under a temporary name, then a rename."""
    with atomic_write(filename) as stream, torch_writing(stream) as output:
        torch.save(content, output)


def to_cpu(content: Any, dtype: torch.dtype | None = None, _seen: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of nested containers whose tensors are on the CPU, floating ones as `dtype`; tied tensors stay tied."""
    seen = {} if _seen is None else _seen
    if isinstance(content, torch.Tensor):
        tensor = content.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)  # tied: same place
        if key not in seen:
            seen[key] = tensor.to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        return seen[key]
    if isinstance(content, dict):
        return type(content)((key, to_cpu(value, dtype, seen)) for key, value in content.items())
    if isinstance(content, list):
        return [to_cpu(value, dtype, seen) for value in content]
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Names and conditions


def save_checkpoint(args: argparse.Namespace, trainer: Any, epoch_itr: Any, val_loss: float | None) -> list[str]:
    """Writes the state under each name whose condition is met, deletes old checkpoints according to the --keep flags,
    and returns the paths written. val_loss (rounded as logged) decides about the best checkpoint; an equal value counts
    as better."""
    better = is_better(args, val_loss, trainer.best_score)
    if better:
        trainer.best_score = val_loss
    if args.no_save or not distributed_utils.is_master(args):
        return []
    names = checkpoint_names(args, epoch_itr, trainer.get_num_updates(), val_loss, better)
    if not names:
        return []
    began = time.perf_counter()
    extra_state = _position(trainer, epoch_itr, val_loss)
    paths = [os.path.join(args.save_dir, name) for name in names]
    trainer.save_checkpoint(paths[0], extra_state)
    for path in paths[1:]:
        duplicate(paths[0], path)
    logger.info(
        "saved checkpoint %s (epoch %d @ %d updates, score %s) (writing took %.1f seconds)",
        paths[0],
        epoch_itr.epoch,
        trainer.get_num_updates(),
        val_loss,
        time.perf_counter() - began,
    )
    delete_old_checkpoints(args, mid_epoch=not epoch_itr.end_of_epoch())
    return paths


def _position(trainer: Any, epoch_itr: Any, val_loss: float | None) -> dict[str, Any]:
    """The state of training: its position in the data, and its validation values."""
    extra_state = {"train_iterator": epoch_itr.state_dict(), "iterated": epoch_itr.identity, "val_loss": val_loss}
    if trainer.best_score is not None:
        extra_state["best"] = trainer.best_score
    return extra_state


class SafePoints:
    """Rewrites `checkpoint_last.pt` inside an epoch about once a minute, so that a kill loses no more than that.
    fairseq saves at the ends of epochs and every --save-interval-updates, which may be hours apart."""

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def due(self, args: argparse.Namespace) -> bool:
        """Whether it is time; never with --no-save or --no-last-checkpoints."""
        if args.no_save or args.no_last_checkpoints or not distributed_utils.is_master(args):
            return False
        return time.monotonic() - self._last >= max(SAFE_POINT_SECONDS, SAFE_POINT_SHARE * self._seconds)

    def save(self, args: argparse.Namespace, trainer: Any, epoch_itr: Any) -> None:
        """Saves the state between two updates."""
        began = time.monotonic()
        trainer.save_checkpoint(os.path.join(args.save_dir, LAST), _position(trainer, epoch_itr, None))
        self._last = time.monotonic()
        self._seconds = self._last - began


def is_better(args: argparse.Namespace, value: float | None, best: float | None) -> bool:
    """Whether a validation value is the best so far; an equal one is."""
    if value is None or best is None:
        return value is not None
    return value >= best if args.maximize_best_checkpoint_metric else value <= best


def checkpoint_names(
    args: argparse.Namespace, epoch_itr: Any, updates: int, val_loss: float | None, better: bool
) -> list[str]:
    """File names for the present state, in fairseq's order."""
    epoch, end_of_epoch = epoch_itr.epoch, epoch_itr.end_of_epoch()
    names = []
    if end_of_epoch and not args.no_epoch_checkpoints and epoch % args.save_interval == 0:
        names.append(f"checkpoint{epoch}.pt")
    if not end_of_epoch and args.save_interval_updates > 0 and updates % args.save_interval_updates == 0:
        names.append(f"checkpoint_{epoch}_{updates}.pt")
    if better:
        names.append("checkpoint_best.pt")
    if val_loss is not None and args.keep_best_checkpoints > 0:
        names.append(f"checkpoint.best_{args.best_checkpoint_metric}_{val_loss:.2f}.pt")
    if not args.no_last_checkpoints:
        names.append(LAST)
    return names


def duplicate(source: str, path: str) -> None:
    """Gives a finished file a second name. Files are replaced, never rewritten, so a hard link is as good as a copy."""
    temporary = temporary_path(path)
    discard([temporary, *leftovers(path)])
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as stream, atomic_write(path) as copy:
            shutil.copyfileobj(stream, copy, 16 << 20)
        return
    publish(temporary, path)


def delete_old_checkpoints(args: argparse.Namespace, mid_epoch: bool) -> None:
    """Applies --keep-interval-updates (only after a mid-epoch save), --keep-last-epochs and --keep-best-checkpoints."""
    if mid_epoch and args.keep_interval_updates > 0:
        _keep(args.save_dir, r"checkpoint_\d+_(\d+)\.pt", args.keep_interval_updates)
    if args.keep_last_epochs > 0:
        _keep(args.save_dir, r"checkpoint(\d+)\.pt", args.keep_last_epochs)
    if args.keep_best_checkpoints > 0:
        pattern = rf"checkpoint\.best_{re.escape(args.best_checkpoint_metric)}_(-?\d+\.?\d*)\.pt"
        _keep(args.save_dir, pattern, args.keep_best_checkpoints, largest=args.maximize_best_checkpoint_metric)


def _keep(folder: str, pattern: str, number: int, largest: bool = True) -> None:
    matches = [match for match in map(re.compile(pattern).fullmatch, os.listdir(folder)) if match]
    matches.sort(key=lambda match: float(match[1]), reverse=largest)
    for match in matches[number:]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, match[0]))


def verify_checkpoint_directory(save_dir: str) -> None:
    """Creates the folder if need be, and makes sure before any work is done that files can be written there."""
    try:
        make_folder(save_dir)
        with tempfile.TemporaryFile(dir=save_dir):  # under a name that nothing else has
            pass
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--save-dir: found {save_dir}, which cannot be written to ({reason}), expected a writable folder"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Restoring


def load_checkpoint(args: argparse.Namespace, trainer: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, Any]:
    """Restores the run that the flags name, or starts a new one. Returns (extra_state or None, epoch iterator)."""
    path, resets = _restore_plan(args)
    extra_state = trainer.load_checkpoint(
        path,
        resets["optimizer"],
        resets["lr_scheduler"],
        literal_dict("--optimizer-overrides", args.optimizer_overrides),
        reset_meters=resets["meters"],
    )
    if extra_state is None and args.restore_file != LAST:
        logger.warning("--restore-file: found no file at %s; training starts from scratch", path)
    if extra_state is not None and not resets["optimizer"] and not resets["meters"]:
        trainer.best_score = extra_state.get("best", trainer.best_score)
        trainer.patience_state = extra_state.get("patience", trainer.patience_state)
    if extra_state is not None and not resets["dataloader"]:
        epoch_itr = _restore_iterator(args, trainer, extra_state, **kwargs)
    else:
        epoch_itr = trainer.get_train_iterator(epoch=0, **kwargs)
    # fairseq passes the running epoch here even in its middle, which moves per-epoch rates ahead by one epoch after a
    # restart; complete epochs are what an uninterrupted run has passed at this point
    trainer.lr_step(epoch_itr.next_epoch_idx - 1)
    return extra_state, epoch_itr


def _restore_plan(args: argparse.Namespace) -> tuple[str, dict[str, bool]]:
    resets = {name: getattr(args, f"reset_{name}") for name in ("optimizer", "lr_scheduler", "meters", "dataloader")}
    if args.restore_file != LAST:
        return args.restore_file, resets
    path = os.path.join(args.save_dir, LAST)
    finetune = getattr(args, "finetune_from_model", None)
    if finetune is None or os.path.exists(path):
        return path, resets
    if any(resets.values()):
        raise UserError(
            "--finetune-from-model: found it together with a --reset-... flag, expected it alone; it resets the "
            "optimizer, schedule, meters and dataloader itself"
        )
    if not os.path.exists(finetune):
        raise UserError(f"--finetune-from-model: found no file at {finetune}, expected a checkpoint; check the path")
    logger.info("fine-tuning from %s", finetune)
    return finetune, dict.fromkeys(resets, True)


def _restore_iterator(args: argparse.Namespace, trainer: Any, extra_state: dict[str, Any], **kwargs: Any) -> Any:
    place = extra_state["train_iterator"]
    if place["epoch"] == 0 and trainer.get_num_updates():
        logger.warning("the checkpoint does not say how much of the data was read; its first epoch starts")
    # the data folder of an epoch follows from how many epochs are complete (several folders take turns)
    running = max(place["epoch"] - 1, 0)
    epoch_itr = trainer.get_train_iterator(epoch=running, **kwargs)
    reason = _other_batches(args, trainer, extra_state, epoch_itr)
    if reason is not None:
        logger.warning(
            "the checkpoint was written after %d batches of epoch %d, which were others (%s); epoch %d starts again",
            place["iterations_in_epoch"],
            place["epoch"],
            reason,
            place["epoch"],
        )
        place = {**place, "iterations_in_epoch": 0}
    elif place.get("iterations_in_epoch", 0) >= extra_state.get("iterated", {}).get("batches", math.inf):
        place = {**place, "iterations_in_epoch": max(len(epoch_itr), 1)}  # complete, however many batches it has now
    epoch_itr.load_state_dict(place)
    complete = epoch_itr.next_epoch_idx - 1
    if complete != running and os.pathsep in args.data:
        epoch_itr = trainer.get_train_iterator(epoch=complete, **kwargs)
    return epoch_itr


def _other_batches(
    args: argparse.Namespace, trainer: Any, extra_state: dict[str, Any], epoch_itr: Any
) -> str | None:
    """Why the checkpoint's position in its batches is not valid for the batches of `epoch_itr`; None where it is valid,
    or where the epoch was complete. Checkpoints of fairseq have no digest of the batches; for these, flags are
    compared."""
    place, then = extra_state["train_iterator"], extra_state.get("iterated")
    offset = place.get("iterations_in_epoch", 0)
    if not offset:
        return None
    saved = vars(trainer.restored_args)
    changed = [
        f"--{name.replace('_', '-')} {saved[name]}, now {getattr(args, name)}"
        for name in BATCHING
        if name in saved and hasattr(args, name) and saved[name] != getattr(args, name)
    ]
    if then is None:
        return "; ".join(changed) or None
    if then == epoch_itr.identity or offset >= then["batches"]:
        return None
    return "; ".join(changed) or "the text is another"
