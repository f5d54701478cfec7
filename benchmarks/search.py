"""Search and distances to given entries of index files, with their recall, side by side:
python benchmarks/search.py --dstore PREFIX --index published=A.index --index fast=B.index."""

from __future__ import annotations

import argparse
import functools
import os

import data
import faiss
import timing
import torch

from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.open_index import open_index
from fairseq.retrieval.index.recall import recall_of
from fairseq.retrieval.index.refined import RefinedIndex


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    data.add_arguments(parser)
    add = parser.add_argument
    add("--index", type=named_file, action="append", required=True, metavar="NAME=FILE", help="index files")
    parser.add_argument("--probe", type=int, nargs="+", default=[32], help="one for all, or one for each index")
    args = parser.parse_args()
    if args.dstore is None:
        parser.error("--dstore: found nothing, expected the datastore of the indexes")
    _, queries = data.load(args)
    datastore, vectors = Datastore.open(args.dstore), torch.from_numpy(queries)
    exact = ExactIndex(datastore.require_keys("a benchmark")).search(vectors, args.k)[1]
    at, given = torch.arange(len(vectors)).repeat_interleave(args.k), exact.flatten()
    indexes = {}
    for number, (name, path) in enumerate(args.index):
        probe = args.probe[min(number, len(args.probe) - 1)]
        size = os.path.getsize(path) / datastore.size
        indexes[name] = (open_index(path, datastore, probe), probe, size)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        searches = {name: functools.partial(index.search, vectors, args.k) for name, (index, _, _) in indexes.items()}
        follows = {name: functools.partial(index[0].distances, vectors, at, given) for name, index in indexes.items()}
        searching = timing.side_by_side(searches, args.repeats)
        following = timing.side_by_side(follows, args.repeats)
        rebuilds = {
            name: functools.partial(index._reconstructed_distances, vectors, at, given, None)
            for name, (index, _, _) in indexes.items()
            if not isinstance(index, RefinedIndex)  # which FAISS cannot rebuild
        }
        rebuilding = timing.side_by_side(rebuilds, args.repeats)
        for name, (index, probe, size) in indexes.items():
            recall = recall_of(index.search(vectors, args.k)[1], exact)
            rows.append(
                {"index": name, "probe": probe, "bytes an entry": size, "threads": threads, "search s": searching[name],
                 "distances s": following[name], "by rebuilding s": rebuilding.get(name, "-"),
                 "recall@1": recall.at_1, f"recall@{args.k}": recall.at_k}
            )
    print(f"{datastore.size} entries, {len(vectors)} queries, k {args.k}; distances to {len(given)} given entries")
    print(timing.conditions(), end="\n\n")
    print(timing.table(rows))


def named_file(text: str) -> tuple[str, str]:
    """argparse type: NAME=FILE of a file that is there."""
    name, _, path = text.partition("=")
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=FILE with an index file")
    return name, path


if __name__ == "__main__":
    timing.run(main)
