"""The provenance that every results file records: the command, versions, git commit, machine, time and peak memory."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from fairseq.files.atomic_io import write_json
from fairseq.refusals import forced

PACKAGES = ("torch", "numpy", "scipy", "faiss-cpu", "faiss-gpu")


def peak_memory_bytes() -> int:
    """Peak resident set size of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit() -> str | None:
    """The commit of the source tree this package runs from, with "+changes" when files differ from it; None outside
    git."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # the package is installed inside the checkout of another project
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def describe_run(args: Any = None) -> dict[str, Any]:
    """Provenance fields of a results file; `args` (a Namespace) becomes its "configuration"."""
    configuration = {} if args is None else {k: _plain(v) for k, v in sorted(vars(args).items())}
    return {
        "command": sys.argv,
        "configuration": configuration,
        "versions": package_versions(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.machine(), "system": platform.system(), "cpu_count": os.cpu_count()},
        "peak_memory_bytes": peak_memory_bytes(),
        "forced": forced(),
    }


def write_results(path: str, results: dict[str, Any], args: Any = None) -> None:
    """Writes `results` together with the run's provenance to `path` as JSON."""
    write_json(path, {**describe_run(args), **results})


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)
