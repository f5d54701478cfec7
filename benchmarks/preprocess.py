"""Binarising a text: `preprocess.py --only-source` and a plain loop over `str.split`, a `Counter` and a dict that
writes the same ids through numpy, alternately on one core; then `preprocess.py` with the given numbers of workers,
which give the same output. The first worker is the process itself; the last column is the processor time of all others.

    python benchmarks/preprocess.py --text train.tokens --workers 1 2
"""

from __future__ import annotations

import argparse
import filecmp
import logging
import resource
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timing import conditions, run, side_by_side, table

from fairseq import options
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq_cli import preprocess

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def plain(text: Path, output: Path) -> None:
    """The ids of every word and of the ends of lines, in the order of a fairseq dictionary."""
    counts: Counter[str] = Counter()
    with open(text, encoding="utf-8") as stream:
        for line in stream:
            counts.update(line.split())
            counts["</s>"] += 1
    words = sorted((word for word in counts if word not in SPECIAL), key=lambda word: (-counts[word], word))
    number = {word: i for i, word in enumerate([*SPECIAL, *words])}
    ids: list[int] = []
    with open(text, encoding="utf-8") as stream:
        for line in stream:
            ids.extend(number[word] for word in line.split())
            ids.append(number["</s>"])
    np.array(ids, np.int32).tofile(output)


def main() -> None:
    """Times them and compares the ids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        others: dict[str, list[float]] = {}

        def ours(workers: int) -> Callable[[], None]:
            def run() -> None:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                logging.disable()
                output = folder / f"{workers}"
                for file in output.glob("*"):
                    file.unlink()
                flags = ["--only-source", "--trainpref", str(args.text), "--workers", str(workers)]
                flags += ["--destdir", str(output)]
                preprocess.main(options.get_preprocessing_parser().parse_args(flags))
                after = resource.getrusage(resource.RUSAGE_CHILDREN)  # (they have been waited for)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                others.setdefault(f"preprocess.py --workers {workers}", []).append(round(spent, 3))

            return run

        ways: dict[str, Callable[[], None]] = {"plain loop": lambda: plain(args.text, folder / "plain")}
        ways |= {f"preprocess.py --workers {workers}": ours(workers) for workers in args.workers}
        seconds = side_by_side(ways, args.repeats)
        wanted = np.fromfile(folder / "plain", np.int32)
        for workers in args.workers:
            made = MMapIndexedDataset(str(folder / str(workers) / "train"))
            assert counted_alike(np.asarray(made.tokens), wanted), "the same ids up to the order of equal counts"
            for file in (folder / str(args.workers[0])).glob("*[xnt]"):
                assert filecmp.cmp(file, folder / str(workers) / file.name, shallow=False)
    print(conditions(), f"; {len(wanted)} tokens", sep="")
    rows = [
        {
            "way": way,
            "seconds": spent,
            "M tokens/s": len(wanted) / spent / 1e6,
            "ratio": seconds["plain loop"] / spent,
            "others' seconds": statistics.median(others.get(way, [0.0])),
        }
        for way, spent in seconds.items()
    ]
    print(table(rows))


def counted_alike(ours: np.ndarray, plain_ids: np.ndarray) -> bool:
    """Whether two texts of ids are equal up to renumbering: each id of one always corresponds to the same id of the
    other."""
    if len(ours) != len(plain_ids):
        return False
    pairs = np.unique(np.stack([ours, plain_ids]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


if __name__ == "__main__":
    run(main)
