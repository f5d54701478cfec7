"""Results files, tables and figures: a process that is killed, or interrupted, while it writes one leaves the earlier
file as it was."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairseq.evaluation.figure_files import WIDE, save_figure
from fairseq.files.atomic_io import write_json
from fairseq.files.provenance import write_results
from fairseq_cli.sweep import write_tables

POINTS: dict[str, Any] = {"points": [], "lm": {"perplexity": 3.0, "count": 5}}


def figure(prefix: str) -> None:
    pytest.importorskip("matplotlib")
    save_figure(prefix, WIDE, lambda figure: figure.subplots().plot([1, 2]))


WRITERS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "JSON": (lambda prefix: write_json(prefix + ".json", {"a": 1}), (".json",)),
    "results": (lambda prefix: write_results(prefix + ".json", {"a": 1}), (".json",)),
    "figure": (figure, (".png", ".svg", ".pdf")),
    "tables": (lambda prefix: write_tables(prefix, POINTS), (".csv", ".md")),
}
ENDS = {"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", WRITERS)
def test_the_earlier_file_stays(name: str, end: str, tmp_path: Path) -> None:
    write, suffixes = WRITERS[name]
    files = [tmp_path / f"r{suffix}" for suffix in suffixes]
    for file in files:
        file.write_text("earlier")

    def killed() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.fsync = lambda descriptor: os.kill(os.getpid(), ENDS[end])  # right before a file gets its name
        try:
            write(str(tmp_path / "r"))
        except KeyboardInterrupt:
            os._exit(7)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(60)
    assert child.exitcode == (-signal.SIGKILL if end == "SIGKILL" else 7)
    assert [file.read_text() for file in files] == ["earlier"] * len(files)
