"""`train.py`: trains a model on binarised data, validates, and saves checkpoints. After an interruption, the same
command continues from `checkpoint_last.pt`, which is at most about a minute old. Log lines, loop and stopping rules are
those of fairseq."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairseq import checkpoint_saving, distributed_utils, metrics, options, progress_bar, tasks, utils
from fairseq.data import iterators
from fairseq.errors import BadFlag, UserError
from fairseq.files import provenance
from fairseq.files.outputs import CHECKPOINT, claimed
from fairseq.meters import TimeMeter
from fairseq.sizes import size_text
from fairseq.trainer import Trainer, training_device
from fairseq.training_flags import check_training_flags
from fairseq_cli.entry import cli_entry, log_start

logger = logging.getLogger("fairseq_cli.train")


@dataclasses.dataclass
class Progress:
    """Counts of this run so far, for the remaining time and the results file."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    first_update: int = 0
    tokens: Any = 0
    training_seconds: float = 0.0
    last_train: dict[str, Any] = dataclasses.field(default_factory=dict)
    last_valid: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    safe_points: checkpoint_saving.SafePoints = dataclasses.field(default_factory=checkpoint_saving.SafePoints)


def main(args: argparse.Namespace, init_distributed: bool = False) -> None:
    """Trains with the parsed flags `args`."""
    utils.import_user_module(args)
    check_training_flags(args)
    if args.max_tokens is None and args.max_sentences is None:
        raise UserError("--max-tokens: found neither it nor --max-sentences, expected a batch size; pass one of them")
    distributed_utils.infer_init_method(args)
    training_device(args)
    metrics.reset()
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if not args.no_save:
        checkpoint_saving.verify_checkpoint_directory(args.save_dir)
    with _outputs(args):
        _run(args)


def _outputs(args: argparse.Namespace) -> contextlib.ExitStack:
    """Locks the outputs of this process: the folder of checkpoints and the results file."""
    with contextlib.ExitStack() as stack:
        if distributed_utils.is_master(args):
            if not args.no_save:
                names = [] if args.no_last_checkpoints else [checkpoint_saving.LAST]
                files = {os.path.join(args.save_dir, name): CHECKPOINT for name in [*names, "checkpoint_best.pt"]}
                stack.enter_context(claimed("--save-dir", os.path.join(args.save_dir, "checkpoint"), files))
            stack.enter_context(claimed("--results-json", args.results_json))
        return stack.pop_all()


def _run(args: argparse.Namespace) -> None:
    log_start(logger, args)
    task = tasks.setup_task(args)
    if hasattr(task, "check_folders"):
        task.check_folders(args.train_subset)
    if not args.disable_validation:
        for subset in args.valid_subset.split(","):
            task.load_dataset(subset, combine=False, epoch=0)
    model = task.build_model(args)
    criterion = task.build_criterion(args)
    logger.info("%s", model)
    logger.info("model %s, criterion %s", args.arch, type(criterion).__name__)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("num. model params: %d (num. trained: %d)", sum(p.numel() for p in model.parameters()), trained)

    trainer = Trainer(args, task, model, criterion)
    logger.info("training on %s", f"{args.distributed_world_size} GPUs" if trainer.cuda else "0 GPUs (the CPU)")
    logger.info("max tokens per GPU = %s and max sentences per GPU = %s", args.max_tokens, args.max_sentences)
    _, epoch_itr = checkpoint_saving.load_checkpoint(args, trainer)
    log_plan(args, trainer, epoch_itr)

    progress = Progress(first_update=trainer.get_num_updates())
    while should_go_on(args, trainer, epoch_itr):
        if train(args, trainer, task, epoch_itr, progress):
            break
        if os.pathsep in args.data:  # several data folders take turns
            epoch_itr = trainer.get_train_iterator(epoch_itr.epoch)
    seconds = time.perf_counter() - progress.began
    logger.info("done training in %.1f seconds", seconds)
    if args.results_json:
        provenance.write_results(args.results_json, results(trainer, epoch_itr, progress, seconds), args)


def stopping_lr(args: argparse.Namespace) -> float:
    """The learning rate at which training ends: `--min-lr`, unless that is the smallest rate of the cosine schedule, as
    in newer versions of fairseq."""
    if args.stop_min_lr is not None:
        return args.stop_min_lr
    newer = args.lr_scheduler == "cosine" and getattr(args, "max_lr", None) is None
    return -1.0 if newer else args.min_lr


def should_go_on(args: argparse.Namespace, trainer: Trainer, epoch_itr: Any) -> bool:
    """Whether training continues, by the limits on rate, epochs, updates and patience."""
    if args.patience >= 0 and trainer.patience_state["runs"] > args.patience:
        logger.info("early stop since valid performance hasn't improved for last %d runs", args.patience)
        return False
    return (
        trainer.get_lr() > stopping_lr(args)
        and epoch_itr.next_epoch_idx <= (args.max_epoch or math.inf)
        and trainer.get_num_updates() < (args.max_update or math.inf)
    )


# ---------------------------------------------------------------------------------------------------------------------
# An epoch


def train(args: argparse.Namespace, trainer: Trainer, task: Any, epoch_itr: Any, progress: Progress) -> bool:
    """Trains for the rest of an epoch, with the validations and checkpoints during it and at its end.

    Returns whether training is to stop."""
    epoch = epoch_itr.next_epoch_idx
    itr = epoch_itr.next_epoch_itr(fix_batches_to_gpus=args.fix_batches_to_gpus, shuffle=epoch > args.curriculum)
    update_freq = args.update_freq[min(epoch, len(args.update_freq)) - 1]
    bar = progress_bar.build_progress_bar(
        args, iterators.GroupedIterator(itr, update_freq), epoch, no_progress_bar="simple"
    )
    task.begin_epoch(epoch, trainer.get_model())
    for meter in (metrics.get_meters("train") or {}).values():
        if isinstance(meter, TimeMeter):
            meter.reset()  # the pause between epochs is not training
    with bar, metrics.aggregate("train"):
        for samples in bar:
            began = time.perf_counter()
            output = trainer.train_step(samples)
            progress.training_seconds += time.perf_counter() - began
            if output is None:
                continue
            progress.tokens = progress.tokens + output.get("ntokens", 0)
            done = trainer.get_num_updates() >= (args.max_update or math.inf)
            if bar.due() and not done:
                stats = training_stats(trainer, metrics.get_smoothed_values("train"))
                stop_if_diverged(stats, trainer)
                stats["eta"] = time_left(args, trainer, len(bar), progress)
                bar.log(stats, tag="train", step=trainer.get_num_updates())
            if done or epoch_itr.end_of_epoch():
                break
            if validate_and_save(args, trainer, task, epoch_itr, progress, end=False):
                return True
            if progress.safe_points.due(args):
                stop_if_diverged(metrics.get_smoothed_values("train"), trainer)
                progress.safe_points.save(args, trainer, epoch_itr)
        progress.last_train = training_stats(trainer, metrics.get_smoothed_values("train"))
        bar.print(progress.last_train, tag="train", step=trainer.get_num_updates())
    stop_if_diverged(progress.last_train, trainer)
    metrics.reset_meters("train")
    return validate_and_save(args, trainer, task, epoch_itr, progress, end=True)


def validate_and_save(
    args: argparse.Namespace, trainer: Trainer, task: Any, epoch_itr: Any, progress: Progress, end: bool
) -> bool:
    """Validates and saves if it is due: at the end of an epoch (or of training), or every so many updates.

    Returns whether training is to stop because validation does not improve."""
    updates, epoch = trainer.get_num_updates(), epoch_itr.epoch
    stopped = end and not epoch_itr.end_of_epoch()  # by --max-update, in mid-epoch
    save = _every(updates, args.save_interval_updates)
    check = save or _every(updates, args.validate_interval_updates)
    if end:
        save = save or stopped or epoch % args.save_interval == 0
        check = check or stopped or epoch % args.validate_interval == 0
    if not end and (save or check):
        stop_if_diverged(metrics.get_smoothed_values("train"), trainer)  # before saving
    valid_losses: list[float | None] = [None]
    if check and not args.disable_validation:
        valid_losses = [*validate(args, trainer, task, epoch_itr, args.valid_subset.split(","), progress)]
        note_patience(args, trainer, valid_losses[0])
    if end:  # also where --max-update stops in mid-epoch: a restart sets per-epoch rates by complete epochs again
        trainer.lr_step(epoch, valid_losses[0])
    if save:
        checkpoint_saving.save_checkpoint(args, trainer, epoch_itr, valid_losses[0])
    return args.patience >= 0 and not end and trainer.patience_state["runs"] > args.patience


def _every(updates: int, interval: int) -> bool:
    return interval > 0 and updates > 0 and updates % interval == 0


def note_patience(args: argparse.Namespace, trainer: Trainer, value: float | None) -> None:
    """Counts validations in a row that did not improve on the best (an equal value is no improvement)."""
    if value is None or args.patience < 0:
        return
    state = trainer.patience_state
    sign = -1 if args.maximize_best_checkpoint_metric else 1
    if state["best"] is None or sign * value < sign * state["best"]:
        state.update(best=value, runs=0)
    else:
        state["runs"] += 1


def validate(
    args: argparse.Namespace, trainer: Trainer, task: Any, epoch_itr: Any, subsets: Sequence[str], progress: Progress
) -> list[float]:
    """The value of `--best-checkpoint-metric` on each subset; its numbers are logged under the subset's name."""
    if args.fixed_validation_seed is not None:
        torch.manual_seed(args.fixed_validation_seed)
    values = []
    for subset in subsets:
        itr = trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False)
        bar = progress_bar.build_progress_bar(
            args, itr, epoch_itr.epoch, prefix=f"valid on '{subset}' subset", no_progress_bar="simple"
        )
        with bar, metrics.aggregate(new_root=True) as meters:
            for sample in bar:
                trainer.valid_step(sample)
            stats = meters.get_smoothed_values()
        metric = args.best_checkpoint_metric
        if metric not in stats:
            raise BadFlag("--best-checkpoint-metric", metric, f"one of {', '.join(stats)}")
        stats["num_updates"] = trainer.get_num_updates()
        if trainer.best_score is not None:
            choose = max if args.maximize_best_checkpoint_metric else min
            stats[f"best_{metric}"] = choose(trainer.best_score, stats[metric])
        bar.print(stats, tag=subset, step=trainer.get_num_updates())
        progress.last_valid[subset] = dict(stats)
        value = stats[metric]
        if isinstance(value, float) and math.isnan(value):
            sentence = f"the {metric} on {subset} is nan after {trainer.get_num_updates()} updates, expected a number"
            raise UserError(f"{sentence}; lower the learning rate, or go back to an earlier checkpoint")
        values.append(value)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def training_stats(trainer: Trainer, stats: dict[str, Any]) -> dict[str, Any]:
    """Adds the seconds since the start of the process."""
    wall = metrics.get_meter("default", "wall")
    stats["wall"] = round(wall.elapsed_time) if wall is not None else 0  # type: ignore[attr-defined]
    return stats


def stop_if_diverged(stats: dict[str, Any], trainer: Trainer) -> None:
    """A loss that is not a number never becomes one again: stops instead of training on."""
    loss = stats.get("loss")
    if isinstance(loss, float) and math.isnan(loss):
        raise UserError(
            f"the training loss is nan after {trainer.get_num_updates()} updates, expected a number; lower the "
            "learning rate, warm up for longer, or clip gradients with --clip-norm"
        )


def planned_updates(args: argparse.Namespace, updates_per_epoch: int) -> int | None:
    """Updates until --max-update or --max-epoch ends the training; None when neither is given."""
    limits = [args.max_update] if args.max_update else []
    if args.max_epoch:
        limits.append(args.max_epoch * updates_per_epoch)
    return min(limits) if limits else None


def time_left(args: argparse.Namespace, trainer: Trainer, updates_per_epoch: int, progress: Progress) -> str:
    """Hours, minutes and seconds until the planned end at this run's average pace; "?" without an end."""
    planned = planned_updates(args, updates_per_epoch)
    if planned is None:
        return "?"
    done = trainer.get_num_updates() - progress.first_update
    pace = (time.perf_counter() - progress.began) / max(done, 1)
    return str(datetime.timedelta(seconds=round(max(planned - trainer.get_num_updates(), 0) * pace)))


def log_plan(args: argparse.Namespace, trainer: Trainer, epoch_itr: Any) -> None:
    """Logs the size of the job before it begins."""
    parameters = sum(p.numel() for p in trainer.get_model().parameters())
    weights = sum(p.numel() * p.element_size() for p in trainer.get_model().parameters())
    states = {"adam": 2, "adadelta": 2, "adamax": 2}.get(args.optimizer, 1)
    size = weights + (0 if args.no_save_optimizer_state else 4 * states * parameters)
    freq = args.update_freq[-1]
    per_epoch = math.ceil(len(epoch_itr) / freq)
    planned = planned_updates(args, per_epoch)
    sizes = epoch_itr.dataset.sizes
    tokens = int(np.sum(sizes)) // max(per_epoch, 1) if not isinstance(sizes, tuple) else 0
    disk = ""
    if not args.no_save:
        disk = f", {size_text(shutil.disk_usage(args.save_dir).free)} free in {args.save_dir}"
    logger.info(
        "plan: %d parameters, %s updates (%d an epoch), about %d tokens per update, checkpoints of %.1f MB%s",
        parameters,
        "unlimited" if planned is None else planned,
        per_epoch,
        tokens,
        size / 1e6,
        disk,
    )


def results(trainer: Trainer, epoch_itr: Any, progress: Progress, seconds: float) -> dict[str, Any]:
    """Content of `--results-json`: losses in bits, counts, times and peak memory."""
    tokens = int(progress.tokens)
    return {
        "program": "train",
        "epoch": epoch_itr.epoch,
        "num_updates": trainer.get_num_updates(),
        "train": dict(progress.last_train),
        "valid": progress.last_valid,
        "best": trainer.best_score,
        "seconds": seconds,
        "training_seconds": progress.training_seconds,
        "tokens_this_run": tokens,
        "tokens_per_second": tokens / progress.training_seconds if progress.training_seconds else None,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if trainer.cuda else None,
    }


def cli_main(modify_parser: Any = None) -> None:
    """Entry of `train.py` and `fairseq-train`."""

    def run() -> None:
        parser = options.get_training_parser()
        if modify_parser is not None:
            modify_parser(parser)
        main(options.parse_args_and_arch(parser))

    cli_entry(run, sys.stdout, goes_on=True)


if __name__ == "__main__":
    cli_main()
