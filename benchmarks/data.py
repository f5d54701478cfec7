"""Keys and queries for the benchmarks: a datastore's, or synthetic ones in clusters."""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.recall import noisy_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, how many queries and neighbours, threads and repeats."""
    parser.add_argument("--dstore", metavar="PREFIX", help="datastore (default: synthetic keys)")
    parser.add_argument("--query-file", metavar="FILE", help="numpy file (B, D) of queries (default: keys with noise)")
    parser.add_argument("--entries", type=int, default=100_000, help="synthetic keys")
    parser.add_argument("--width", type=int, default=1024, help="width of synthetic keys")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)


def load(args: argparse.Namespace) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Keys (N, D) and queries (B, D) float32."""
    if args.dstore is None:
        keys = clustered(args.entries, args.width)
    else:
        keys = Datastore.open(args.dstore).require_keys("a benchmark")
    if args.query_file is None:
        return keys, noisy_keys(keys, args.queries).numpy()
    queries = np.load(args.query_file, mmap_mode="r")
    chosen = np.random.default_rng(0).choice(len(queries), min(len(queries), args.queries), replace=False)
    return keys, np.asarray(queries[np.sort(chosen)], np.float32)


def clustered(entries: int, width: int, seed: int = 0) -> NDArray[np.float16]:
    """(entries, width): points around a thousandth as many centres, most of their spread in few directions."""
    generator = np.random.default_rng(seed)
    spread = (1 / np.sqrt(1 + np.arange(width))).astype(np.float32)
    centres = generator.standard_normal((max(1, entries // 1000), width), np.float32) * spread
    keys = np.empty((entries, width), np.float16)
    for start in range(0, entries, 1 << 14):
        some = generator.standard_normal((min(1 << 14, entries - start), width), np.float32) * spread
        keys[start : start + len(some)] = some + centres[generator.integers(len(centres), size=len(some))]
    return keys
