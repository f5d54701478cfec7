"""Progress of a loop over batches, in fairseq's four forms (`--log-format`): tqdm, simple, json, none.

    epoch 001:    100 / 3000 loss=9.1, ppl=549.75, ...       simple, within an epoch: `log`
    epoch 001 | loss 8.5 | ppl 362.04 | ...                  simple, after it: `print`

Numbers have six significant digits. Reading them can make the CPU wait for the GPU, so ask `due()` before."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from fairseq.errors import MissingDependency
from fairseq.meters import AverageMeter, Meter, StopwatchMeter, TimeMeter

logger = logging.getLogger(__name__)

POSTFIX_SECONDS = 1.0
"""A terminal bar's numbers are refreshed at most this often."""


def build_progress_bar(
    args: argparse.Namespace,
    iterator: Any,
    epoch: int | None = None,
    prefix: str | None = None,
    default: str = "tqdm",
    no_progress_bar: str = "none",
) -> BaseProgressBar:
    """The progress bar for `--log-format`, `--no-progress-bar` and the terminal."""
    log_format = args.log_format
    if log_format is None:
        log_format = no_progress_bar if args.no_progress_bar else default
    if log_format == "tqdm" and not sys.stderr.isatty():
        log_format = "simple"
    make = {"json": JsonProgressBar, "none": NoopProgressBar, "simple": SimpleProgressBar, "tqdm": TqdmProgressBar}
    bar = make[log_format](iterator, epoch, prefix, args.log_interval)
    if getattr(args, "tensorboard_logdir", ""):
        bar = TensorboardProgressBarWrapper(bar, args.tensorboard_logdir)
    return bar


def format_stat(stat: Any) -> str:
    """A number with six significant digits; the average, rate or seconds behind a meter; anything else as it is."""
    if isinstance(stat, AverageMeter | TimeMeter):
        stat = stat.avg
    elif isinstance(stat, StopwatchMeter):
        stat = stat.sum
    elif isinstance(stat, Meter):
        stat = stat.smoothed_value
    if hasattr(stat, "item"):
        stat = stat.item()
    return f"{stat:g}" if isinstance(stat, int | float) and not isinstance(stat, bool) else str(stat)


class BaseProgressBar:
    """Iterates over `iterable`. `i` is the number (from 0) of the current item in the epoch, also after a restart."""

    def __init__(
        self, iterable: Any, epoch: int | None = None, prefix: str | None = None, log_interval: int = 1000
    ) -> None:
        self.iterable, self.epoch, self.log_interval = iterable, epoch, log_interval
        self.offset: int = getattr(iterable, "offset", 0)
        self.size: int = len(iterable)
        self.i = self.offset
        parts = ([] if epoch is None else [f"epoch {epoch:03d}"]) + ([] if prefix is None else [prefix])
        self.prefix = " | ".join(parts)

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> BaseProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        for i, item in enumerate(self.iterable, start=self.offset):
            self.i = i
            yield item

    def due(self) -> bool:
        """Whether `log` would show something now."""
        return False

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        """Shows `stats` if it is due."""

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        """Shows the `stats` of a finished loop under the logger `tag`."""

    def _on_interval(self) -> bool:
        return self.i > 0 and self.log_interval > 0 and (self.i + 1) % self.log_interval == 0

    def _print_line(self, stats: Mapping[str, Any], tag: str | None) -> None:
        line = " | ".join([self.prefix, *(f"{key} {format_stat(value)}" for key, value in stats.items())])
        logging.getLogger(tag or __name__).info("%s", line)


class NoopProgressBar(BaseProgressBar):
    """`none`: shows nothing."""


class SimpleProgressBar(BaseProgressBar):
    """`simple`: a line every `log_interval` items, one at the end."""

    def due(self) -> bool:
        return self._on_interval()

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        if self.due():
            numbers = ", ".join(f"{key}={format_stat(value)}" for key, value in stats.items())
            logging.getLogger(tag or __name__).info("%s:  %5d / %d %s", self.prefix, self.i, self.size, numbers)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        self._print_line(stats, tag)


class JsonProgressBar(BaseProgressBar):
    """`json`: one object a line; values are strings as fairseq writes them, epoch and update are numbers."""

    def due(self) -> bool:
        return self._on_interval()

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        if self.due():
            update = None if self.epoch is None else round(self.epoch - 1 + self.i / self.size, 3)
            self._write(stats, tag, update)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        self._write({f"{tag}_{key}" if tag else key: value for key, value in stats.items()}, tag, None)

    def _write(self, stats: Mapping[str, Any], tag: str | None, update: float | None) -> None:
        content: OrderedDict[str, Any] = OrderedDict()
        if self.epoch is not None:
            content["epoch"] = self.epoch
        if update is not None:
            content["update"] = update
        content.update((key, format_stat(value)) for key, value in stats.items())
        logging.getLogger(tag or __name__).info("%s", json.dumps(content))


class TqdmProgressBar(BaseProgressBar):
    """`tqdm`: a bar on the terminal; it shows rate and time left of the epoch by itself."""

    def __init__(
        self, iterable: Any, epoch: int | None = None, prefix: str | None = None, log_interval: int = 1000
    ) -> None:
        super().__init__(iterable, epoch, prefix, log_interval)
        from tqdm import tqdm

        self.bar = tqdm(iterable, self.prefix, leave=False, initial=self.offset, total=self.size)
        self._shown = 0.0

    def __iter__(self) -> Iterator[Any]:
        for i, item in enumerate(self.bar, start=self.offset):
            self.i = i
            yield item

    def due(self) -> bool:
        return time.monotonic() - self._shown >= POSTFIX_SECONDS

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        if self.due():
            self._shown = time.monotonic()
            self.bar.set_postfix({key: format_stat(value) for key, value in stats.items()}, refresh=False)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        self.bar.close()
        self._print_line(stats, tag)


class TensorboardProgressBarWrapper(BaseProgressBar):
    """Passes everything on to another bar and also writes it for tensorboard, below `logdir`/tag."""

    def __init__(self, wrapped: BaseProgressBar, logdir: str) -> None:
        super().__init__(wrapped.iterable, wrapped.epoch, None, wrapped.log_interval)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "--tensorboard-logdir", "pip install tensorboard") from error
        self.wrapped, self.logdir, self._make = wrapped, logdir, SummaryWriter
        self._writers: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        for item in self.wrapped:
            self.i = self.wrapped.i
            yield item

    def __exit__(self, *exc: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def due(self) -> bool:
        return self.wrapped.due() or self._on_interval()

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        if self._on_interval():
            self._write(stats, tag, step)
        self.wrapped.log(stats, tag, step)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None) -> None:
        self._write(stats, tag, step)
        self.wrapped.print(stats, tag, step)

    def _write(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        name = tag or ""
        if name not in self._writers:
            self._writers[name] = self._make(f"{self.logdir}/{name}")
        writer = self._writers[name]
        for key, value in stats.items():
            number = getattr(value, "avg", value)
            if key != "num_updates" and isinstance(number, int | float):
                writer.add_scalar(key, number, stats.get("num_updates", step) if step is None else step)
        writer.flush()
