"""Building an index: compares `build_dstore.py` with bare FAISS training and adding of the same keys with the same
settings, alternately; and measures the bytes that `build_dstore.py` writes, in units of the size of the index (it also
writes the codes, to continue after a kill).

    python benchmarks/build_index.py --dstore dstore16 --ncentroids 1024 --code-size 32
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from timing import conditions, run, side_by_side, table

from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.build_index import TRAINING_SAMPLE, IndexBuilder, IndexRecipe


def main() -> None:
    """Times both, and counts what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dstore", required=True)
    parser.add_argument("--ncentroids", type=int, default=1024)
    parser.add_argument("--code-size", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    logging.disable()
    datastore = Datastore.open(args.dstore)
    keys = datastore.require_keys("building")
    written: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=Path(args.dstore).parent) as folder:
        path = str(Path(folder) / "index")

        def bare() -> None:
            width = keys.shape[1]
            index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, args.ncentroids, args.code_size, 8)
            index.train(np.asarray(keys[:TRAINING_SAMPLE], np.float32))
            for start in range(0, len(keys), args.chunk):
                index.add(np.asarray(keys[start : start + args.chunk], np.float32))
            faiss.write_index(index, path + ".bare")

        def ours() -> None:
            for file in Path(folder).glob("index*"):
                file.unlink()
            recipe = IndexRecipe(args.ncentroids, args.code_size, 8, 1)
            IndexBuilder(datastore, path, recipe, len(keys), args.chunk).build(show_progress=False)

        ways = {"train, add, write with FAISS": bare, "build_dstore.py": ours}
        seconds = side_by_side({name: counted(way, name, written) for name, way in ways.items()}, args.repeats)
        size = os.path.getsize(path)
    first = next(iter(seconds.values()))
    print(conditions(), f"; {args.threads} thread(s), {len(keys)} x {keys.shape[1]} keys", sep="")
    rows = [
        {"build": name, "seconds": spent, "ratio": spent / first, "bytes written / index": written[name] / size}
        for name, spent in seconds.items()
    ]
    print(table(rows))


def counted(way: Callable[[], None], name: str, written: dict[str, int]) -> Callable[[], None]:
    """`way`, wrapped to record the bytes that it writes (Linux)."""

    def run() -> None:
        before = written_bytes()
        way()
        written[name] = written_bytes() - before

    return run


def written_bytes() -> int:
    """Bytes that this process has written so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


if __name__ == "__main__":
    run(main)
