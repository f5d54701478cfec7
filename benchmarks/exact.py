"""Exact search: compares `--index exact` with FAISS. python benchmarks/exact.py --dstore PREFIX (or synthetic keys)."""

from __future__ import annotations

import argparse

import data
import faiss
import numpy as np
import timing
import torch

from fairseq.retrieval.index.exact_index import ExactIndex


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    data.add_arguments(parser)
    args = parser.parse_args()
    keys, queries = data.load(args)
    flat = faiss.IndexFlatL2(keys.shape[1])
    flat.add(np.asarray(keys, np.float32))
    ours = {"--index exact": ExactIndex(keys), "--index exact, float32 products": ExactIndex(keys, int8=False)}
    query_tensor = torch.from_numpy(queries)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        ways = {name: lambda index=index: index.search(query_tensor, args.k) for name, index in ours.items()}
        ways["faiss.IndexFlatL2"] = lambda: flat.search(queries, args.k)
        seconds = timing.side_by_side(ways, args.repeats)
        for name, spent in seconds.items():
            rows.append({"search": name, "threads": threads, "s": spent, "speed": seconds["faiss.IndexFlatL2"] / spent})
    print(f"{len(keys)} x {keys.shape[1]} {keys.dtype} keys, {len(queries)} queries, k {args.k}")
    print(timing.conditions(), end="\n\n")
    print(timing.table(rows))


if __name__ == "__main__":
    timing.run(main)
