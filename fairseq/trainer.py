"""The trainer: one update over a group of micro-batches, one validation step, and the state that a checkpoint keeps.

An update: seed = seed + number of updates; gradients of the summed loss of all micro-batches; divided by their total
sample size; clipped; optimiser step; next learning rate. The CPU does not wait for the GPU: sizes, losses and norms
stay tensors until a line is printed (except for the loss scaling of --fp16, which has to detect overflows)."""

from __future__ import annotations

import argparse
import logging
import os
import time
from typing import Any

import torch

from fairseq import checkpoint_saving, checkpoint_utils, metrics, optim, training_state, utils
from fairseq.errors import BadFile, UserError
from fairseq.meters import TimeMeter
from fairseq.models import ARCH_MODEL_REGISTRY, ArchitectureMismatch
from fairseq.optim import lr_scheduler as lr_schedulers
from fairseq.optim.fp16_optimizer import half_precision_dtype, unique_parameters
from fairseq.option_checks import actions_of

logger = logging.getLogger(__name__)


class Trainer:
    """Trains `model` with `criterion` and the flags `args`. Optimiser and schedule are built when first used."""

    def __init__(self, args: argparse.Namespace, task: Any, model: Any, criterion: Any, *unused: Any) -> None:
        self.args, self.task = args, task
        self.device = training_device(args)
        self.cuda = self.device.type == "cuda"
        dtype = half_precision_dtype(args)
        if dtype == torch.float16 and not self.cuda:
            raise UserError("--fp16: found no GPU to train on, expected one; use --bf16, or leave it out")
        self._model = model.to(self.device, dtype)
        self._criterion = criterion.to(self.device, dtype)
        self._wrapped_model = torch.compile(self._model) if getattr(args, "torch_compile", False) else self._model
        self._optimizer: Any = None
        self._lr_scheduler: Any = None
        self._optim_history: list[dict[str, Any]] = []
        self.restored_args = argparse.Namespace()  # of the checkpoint that was loaded
        self._num_updates = 0
        self._dummy_batch: Any = None
        self._start_time = time.time()
        self._previous_training_time = 0.0
        self.best_score: float | None = None
        self.patience_state: dict[str, Any] = {"best": None, "runs": 0}
        metrics.log_start_time("wall", priority=790, round=0)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    @property
    def model(self) -> Any:
        """The model to call (compiled when `--torch-compile` is given)."""
        return self._wrapped_model

    @property
    def criterion(self) -> Any:
        """The criterion."""
        return self._criterion

    @property
    def optimizer(self) -> Any:
        """The optimiser."""
        if self._optimizer is None:
            self._build_optimizer()
        return self._optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule."""
        if self._lr_scheduler is None:
            self._build_optimizer()
        return self._lr_scheduler

    def _build_optimizer(self) -> None:
        params = unique_parameters(self._model, self._criterion)
        if not params:
            raise UserError("the model has no trainable parameters")
        if half_precision_dtype(self.args) == torch.float32:
            self._optimizer = optim.build_optimizer(self.args, params)
        elif getattr(self.args, "memory_efficient_fp16", False):
            self._optimizer = optim.MemoryEfficientFP16Optimizer.build_optimizer(self.args, params)
        else:
            self._optimizer = optim.FP16Optimizer.build_optimizer(self.args, params)
        self._lr_scheduler = lr_schedulers.build_lr_scheduler(self.args, self._optimizer)
        self._lr_scheduler.step_update(0)

    def get_model(self) -> Any:
        """The model itself."""
        return self._model

    def get_criterion(self) -> Any:
        """The criterion itself."""
        return self._criterion

    def get_num_updates(self) -> int:
        """Completed updates."""
        return self._num_updates

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of completed updates, and with it the learning rate."""
        self._num_updates = num_updates
        self.lr_step_update()
        metrics.log_scalar("num_updates", num_updates, weight=0, priority=200)

    def get_lr(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.get_lr()

    def lr_step(self, epoch: int, val_loss: float | None = None) -> float:
        """Tells the schedule that `epoch` epochs are complete; returns the new rate."""
        self.lr_scheduler.step(epoch, val_loss)
        return self.lr_step_update()

    def lr_step_update(self) -> float:
        """Sets the rate of the next update and returns it."""
        new_lr = self.lr_scheduler.step_update(self._num_updates)
        metrics.log_scalar("lr", new_lr, weight=0, priority=300)
        return new_lr

    def training_seconds(self) -> float:
        """Seconds spent training, earlier runs of the same command included."""
        return time.time() - self._start_time + self._previous_training_time

    # -----------------------------------------------------------------------------------------------------------------
    # Data

    def get_train_iterator(self, epoch: int, combine: bool = True, load_dataset: bool = True) -> Any:
        """Iterator over the batches of the training split after `epoch` complete epochs."""
        args = self.args
        if load_dataset:
            logger.info("loading train data for epoch %d", epoch)
            self.task.load_dataset(args.train_subset, epoch=epoch, combine=combine)
        return self.task.get_batch_iterator(
            dataset=self.task.dataset(args.train_subset),
            max_tokens=args.max_tokens,
            max_sentences=args.max_sentences,
            max_positions=utils.resolve_max_positions(
                self.task.max_positions(), self._model.max_positions(), args.max_tokens
            ),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=args.required_batch_size_multiple,
            seed=args.seed,
            num_workers=args.num_workers,
            epoch=epoch,
        )

    def get_valid_iterator(self, subset: str) -> Any:
        """Batches of a validation split."""
        args = self.args
        return self.task.get_batch_iterator(
            dataset=self.task.dataset(subset),
            max_tokens=args.max_tokens_valid,
            max_sentences=args.max_sentences_valid,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self._model.max_positions()),
            ignore_invalid_inputs=args.skip_invalid_size_inputs_valid_test,
            required_batch_size_multiple=args.required_batch_size_multiple,
            seed=args.seed,
            num_workers=args.num_workers,
        )

    def _prepare_sample(self, sample: Any) -> Any:
        if sample is None or len(sample) == 0:
            return None
        if self.cuda:
            sample = utils.move_to_cuda(sample, self.device)
        dtype = half_precision_dtype(self.args)
        if dtype != torch.float32:
            sample = utils.apply_to_sample(lambda t: t.to(dtype) if t.dtype == torch.float32 else t, sample)
        return sample

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> dict[str, Any] | None:
        """One update over micro-batches. Returns the sums of their logging outputs, or None when the update was skipped
        (out of memory, overflow). Numbers in it may be tensors on the GPU."""
        torch.manual_seed(self.args.seed + self._num_updates)
        self.model.train()
        self.criterion.train()
        self.zero_grad()
        metrics.log_start_time("train_wall", priority=800, round=0)
        outputs, sample_size, ooms = self._accumulate(samples, raise_oom)
        if not outputs:
            logger.warning("OOM in all batches of the update, skipping it")
            self.zero_grad()
            metrics.log_stop_time("train_wall")
            return None
        try:
            grad_norm = self._apply_gradients(sample_size)
        except OverflowError as overflow:
            logger.info("NOTE: overflow detected, %s", overflow)
            self.zero_grad()
            metrics.log_stop_time("train_wall")
            return None
        self.set_num_updates(self._num_updates + 1)
        self._log_update(outputs, grad_norm, ooms)
        frequency = self.args.empty_cache_freq
        if self.cuda and frequency > 0 and self._num_updates % frequency == 0:
            torch.cuda.empty_cache()
        metrics.log_stop_time("train_wall")
        keys = {key: None for output in outputs for key in output}
        return {key: sum(output.get(key, 0) for output in outputs) for key in keys}

    def _accumulate(self, samples: list[Any], raise_oom: bool) -> tuple[list[dict[str, Any]], Any, int]:
        """Backward passes. Returns (logging outputs, total sample size, number of batches that ran out of memory)."""
        outputs: list[dict[str, Any]] = []
        sample_size: Any = 0
        ooms = 0
        for sample in samples:
            is_dummy = sample is None or len(sample) == 0  # padding of a shard: its gradient counts nothing
            if is_dummy and self._dummy_batch is None:
                continue
            if self._dummy_batch is None:
                self._dummy_batch = sample
            try:
                _, size, output = self.task.train_step(
                    self._prepare_sample(self._dummy_batch if is_dummy else sample),
                    self.model,
                    self.criterion,
                    self.optimizer,
                    ignore_grad=is_dummy,
                )
            except torch.OutOfMemoryError as error:
                if raise_oom:
                    raise
                # this batch's gradient is incomplete and mixed with that of the earlier ones: all of it goes, and so do
                # their sizes, lest the gradient of the later ones be divided by too much
                logger.warning("attempting to recover from OOM in forward/backward pass: %s", error)
                ooms += 1
                outputs, sample_size = [], 0
                self.zero_grad()
                if self.cuda:
                    torch.cuda.empty_cache()
                continue
            if not is_dummy:
                outputs.append(output)
                sample_size = sample_size + size
        return outputs, sample_size, ooms

    def _apply_gradients(self, sample_size: Any) -> torch.Tensor:
        self.optimizer.fill_missing_gradients()
        if isinstance(sample_size, torch.Tensor):
            self.optimizer.multiply_grads((1.0 / sample_size.clamp(min=1)).float())
        elif sample_size > 0:
            self.optimizer.multiply_grads(1.0 / sample_size)
        grad_norm = self.optimizer.clip_grad_norm(self.args.clip_norm)
        self.optimizer.step()
        return grad_norm

    def _log_update(self, outputs: list[dict[str, Any]], grad_norm: torch.Tensor, ooms: int) -> None:
        self.task.reduce_metrics(outputs, self._criterion)
        clip = self.args.clip_norm
        metrics.log_speed("ups", 1.0, priority=100, round=2)
        metrics.log_scalar("gnorm", grad_norm, priority=400, round=3)
        metrics.log_scalar("clip", (grad_norm > clip) * 100.0 if clip > 0 else 0.0, priority=500, round=1)
        metrics.log_scalar("oom", ooms, priority=600, round=3)
        if getattr(self.optimizer, "scaler", None) is not None:
            metrics.log_scalar("loss_scale", self.optimizer.loss_scale, priority=700, round=4)

    def valid_step(self, sample: Any, raise_oom: bool = False) -> dict[str, Any] | None:
        """Loss of one validation batch, logged to the open aggregators; None for a padding batch."""
        prepared = self._prepare_sample(sample)
        if prepared is None:
            return None
        self.model.eval()
        self.criterion.eval()
        try:
            with torch.no_grad():
                _, _, output = self.task.valid_step(prepared, self.model, self.criterion)
        except torch.OutOfMemoryError:
            if raise_oom:
                raise
            logger.warning("ran out of memory in validation step, retrying batch")
            torch.cuda.empty_cache()
            return self.valid_step(sample, raise_oom=True)
        with metrics.aggregate("valid"):
            self.task.reduce_metrics([output], self._criterion)
        return output

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.optimizer.zero_grad()

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        """Writes the whole state; `extra_state` is completed by the metrics, the patience and the training time."""
        extra_state = {
            **extra_state,
            "metrics": metrics.state_dict(),
            "previous_training_time": self.training_seconds(),
            "patience": dict(self.patience_state),
        }
        checkpoint_saving.save_state(
            filename,
            self.args,
            self._model.state_dict(),
            self._criterion,
            self.optimizer,
            self.lr_scheduler,
            self._num_updates,
            self._optim_history,
            extra_state,
        )

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        """Restores the state in `filename`, except for the parts that the --reset flags name; returns its extra_state,
        None for a missing file."""
        if not os.path.exists(filename):
            logger.info("no existing checkpoint found %s", filename)
            return None
        state = checkpoint_utils.load_checkpoint_to_cpu(filename)
        self._load_weights(filename, state)
        self.restored_args = state["args"]
        extra_state = training_state.check_extra_state(filename, state["extra_state"])
        self._optim_history = list(training_state.check_history(filename, state["optimizer_history"]))
        if not reset_optimizer:
            self._load_optimizer(filename, state, reset_lr_scheduler, optimizer_overrides)
        epoch = extra_state.get("train_iterator", {}).get("epoch", 0)
        logger.info("loaded checkpoint %s (epoch %d @ %d updates)", filename, epoch, self._num_updates)
        if not reset_meters:
            self._load_meters(extra_state)
        return extra_state

    def _load_weights(self, filename: str, state: dict[str, Any]) -> None:
        try:
            checkpoint_utils.check_parameters(filename, self.args, state["model"])
            self._model.load_state_dict(state["model"], strict=True)
            if state.get("criterion"):
                checkpoint_utils.check_parameters(filename, self.args, state["criterion"])
                self._criterion.load_state_dict(state["criterion"], strict=True)
        except (ArchitectureMismatch, RuntimeError) as error:
            raise BadFile(
                filename,
                f"parameters of another architecture ({' '.join(str(error).split())})",
                "those of the model that the flags describe",
                "make sure that the architectures and dictionaries match, or choose another --save-dir",
            ) from error
        self._warn_of_another_model(filename, state["args"])
        self._optimizer = self._lr_scheduler = None  # float32 copies of the old weights are out of date

    def _warn_of_another_model(self, filename: str, stored: argparse.Namespace) -> None:
        """Warns of options with which the same weights are another model, such as the number of heads."""
        names = actions_of([ARCH_MODEL_REGISTRY.get(str(getattr(self.args, "arch", "")), type(self._model))])
        before, now = vars(stored), vars(self.args)
        for name in sorted(names.keys() & before.keys() & now.keys()):
            if before[name] != now[name]:
                flag = "--" + name.replace("_", "-")
                said = "%s: found %s %r; the command line's %r counts from here on, so the model is another one"
                logger.warning(said, filename, flag, before[name], now[name])

    def _load_optimizer(
        self, filename: str, state: dict[str, Any], reset_lr_scheduler: bool, overrides: dict[str, Any] | None
    ) -> None:
        saved = state.get("last_optimizer_state")
        if saved is None:
            logger.warning("%s holds no optimizer state; optimizer and schedule start anew", filename)
            return
        last = self._optim_history[-1]
        for what, ours in (("criterion", self._criterion), ("optimizer", self.optimizer)):
            name = last.get(f"{what}_name")
            if name != type(ours).__name__:
                raise BadFile(
                    filename,
                    f"{what} {name}",
                    type(ours).__name__,
                    "pass --reset-optimizer to start with a fresh optimizer",
                )
        if not reset_lr_scheduler:
            own = self.lr_scheduler.state_dict()
            schedule = training_state.check_schedule(filename, last.get("lr_scheduler_state"), own)
            self.lr_scheduler.load_state_dict(schedule)
        saved = training_state.check_optimizer_state(filename, saved, self.optimizer, last["num_updates"])
        try:
            self.optimizer.load_state_dict(saved, overrides)
        except ValueError as error:
            raise BadFile(
                filename,
                f"an optimizer state that does not fit ({error})",
                "one for this model",
                "pass --reset-optimizer",
            ) from error
        self.set_num_updates(int(last["num_updates"]))

    def _load_meters(self, extra_state: dict[str, Any]) -> None:
        self._previous_training_time = float(extra_state.get("previous_training_time", 0.0))
        self._start_time = time.time()
        if "metrics" not in extra_state:
            return
        metrics.load_state_dict(extra_state["metrics"])
        for meter in (metrics.get_meters("default") or {}).values():
            if isinstance(meter, TimeMeter):
                meter.reset()
        metrics.log_start_time("wall", priority=790, round=0)


def training_device(args: argparse.Namespace) -> torch.device:
    """The GPU that `--device-id` names, or the CPU with `--cpu` or without a GPU."""
    if args.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(args.device_id)
    return torch.device("cuda", args.device_id)
