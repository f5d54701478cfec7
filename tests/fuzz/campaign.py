"""Runs a reader on damaged inputs in a separate process, with limits on time and memory, and counts outcomes: "refused"
in one sentence; "unharmed", if the result equals that of the undamaged files to the bit (for a job that continues: its
final result); "silent", another result; "read", where results are not compared, since damage cannot be detected without
digests.

`FUZZ_CASES=10000 pytest tests/fuzz` is the full campaign, `python -m tests.fuzz.campaign CASES READER...` prints it."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.mutation import mutate

GOOD = ("read", "refused", "unharmed")
SECONDS_A_CASE = 10
MEMORY = 1 << 30  # a case may add this much address space to what the process has when it starts


class TooSlow(BaseException):
    """A case that ran longer than its limit; a BaseException, so that no reader can turn it into a UserError."""


@dataclass
class Outcome:
    """How many cases ended how, and the first failures as (seed, kind of error, place)."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def restore(folder: Path, originals: Mapping[Path, bytes]) -> None:
    """Makes the files of a folder these again."""
    for path in folder.rglob("*"):
        if path not in originals and not path.is_dir():
            path.unlink()
    for path, content in originals.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def one_case(
    reader: Any, folder: Path, originals: dict[Path, bytes], paths: list[Path], seed: int, answer: object = None
) -> str:
    """Damages one file, reads, restores all. Returns "read", "refused", or what went wrong; with an `answer` to compare
    with "unharmed" or "silent" for "read"."""
    from fairseq.errors import UserError

    path = paths[seed % len(paths)]
    damaged = mutate(seed, originals[path])
    path.write_bytes(damaged)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        found = reader.read(folder)
        if answer is None:
            return "read"
        return "unharmed" if found == answer else f"silent: another answer from {path.name}"
    except UserError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"not one sentence: {error!r}"[:300]
    except TooSlow:
        return "hang: " + traceback.format_exc(limit=-3)[-600:]
    except BaseException as error:  # noqa: BLE001  (whatever it is, it is what is looked for)
        return f"{type(error).__name__}: " + traceback.format_exc(limit=-4)[-900:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore(folder, originals)


def run_share(name: str, first: int, last: int, folder: Path) -> Outcome:
    """Cases first <= seed < last of a reader, in this process. Its progress is in `folder/seed`."""
    if name == "index":
        from tests.fuzz.index_reader import READER as reader
    else:
        from tests.fuzz.readers import READERS

        reader = READERS[name]
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # readers are small, and other shares may run
    work = folder / "files"
    work.mkdir(exist_ok=True)
    paths = reader.prepare(work)
    originals = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    answer = reader.read(work) if reader.compares else None
    restore(work, originals)
    reader.read(work)  # everything is imported and warm now
    restore(work, originals)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def expired(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, expired)
    outcome = Outcome()
    for seed in range(first, last):
        (folder / "seed").write_text(str(seed))
        result = one_case(reader, work, originals, paths, seed, answer)
        outcome.counts[result.split(":")[0]] += 1
        if result not in GOOD:
            outcome.failures.append((seed, result))
    return outcome


def run(name: str, cases: int, first: int = 0) -> Outcome:
    """`cases` cases in child processes: one that a crash of native code ends is counted and gone round."""
    total = Outcome()
    last = first + cases
    while first < last:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            child = multiprocessing.get_context("fork").Process(target=_child, args=(name, first, last, folder))
            child.start()
            child.join()
            if child.exitcode == 0:
                _add(total, *pickle.loads((folder / "outcome").read_bytes()))
                break
            seed = int((folder / "seed").read_text())
            _add(total, {"crash": 1}, [(seed, f"crash: status {child.exitcode}")])
            if seed > first:  # the share before the crash, whose counts went with the process
                before = run(name, seed - first, first)
                _add(total, before.counts, before.failures)
            first = seed + 1
    return total


def _child(name: str, first: int, last: int, folder: Path) -> None:
    share = run_share(name, first, last, folder)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "outcome").write_bytes(pickle.dumps((share.counts, share.failures[:200])))


def _add(total: Outcome, counts: Mapping[str, int], failures: list[tuple[int, str]]) -> None:
    total.counts.update(counts)
    total.failures += failures


if __name__ == "__main__":
    for chosen in sys.argv[2:]:
        began = time.perf_counter()
        outcome = run(chosen, int(sys.argv[1]))
        print(chosen, dict(outcome.counts), f"{time.perf_counter() - began:.0f} s", flush=True)
        for seed, what in {what[-60:]: (seed, what) for seed, what in outcome.failures}.values():
            print(f"seed {seed}: {what}", flush=True)
