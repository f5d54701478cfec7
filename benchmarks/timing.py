"""Functions of all benchmarks: timing several implementations of one task alternately, and a table of the results."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fairseq_cli.entry import cli_entry

PROCESSOR_TIME = os.environ.get("BENCHMARK_CLOCK") == "processor"  # of all threads, where other work disturbs
clock = time.process_time if PROCESSOR_TIME else time.perf_counter


def run(main: Callable[[], object]) -> None:
    """Runs a benchmark as a command: a mistake is one sentence and status 2. The log goes to standard error."""
    cli_entry(main, sys.stderr)


def side_by_side(ways: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each callable. They run alternately, so that other load on the machine affects all in the same
    way.

    Each is called once before, untimed, if `warm_up`."""
    for way in ways.values() if warm_up else ():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one column a key of the first row; numbers with three significant digits."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions() -> str:
    """One line: date, command and processor."""
    command = shlex.join(["python", *sys.argv])
    processor = platform.processor() or platform.machine()
    return f"{datetime.date.today()}, `{command}`, {processor}, {'processor' if PROCESSOR_TIME else 'wall-clock'} time"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
