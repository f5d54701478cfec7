"""k-means of a datastore's keys into N/100 clusters: `faiss.Kmeans` and a search of its centroids, as published, and
`kmeans.py --algorithm two-level`, with the same number of iterations on the same threads.

    python benchmarks/kmeans.py --dstore dstore16
"""

from __future__ import annotations

import argparse
import logging

import faiss
import numpy as np
import torch
from timing import conditions, run, side_by_side, table

from fairseq.retrieval.clusters.kmeans import KMeansRecipe, cluster_keys
from fairseq.retrieval.datastore import Datastore


def main() -> None:
    """Times both, and compares their objectives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dstore", required=True)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    logging.disable()
    stored = Datastore.open(args.dstore).require_keys("clustering")
    keys = np.ascontiguousarray(stored, np.float32)
    clusters = max(1, len(keys) // 100)
    found: dict[str, np.ndarray] = {}

    def published() -> None:
        kmeans = faiss.Kmeans(keys.shape[1], clusters, niter=args.iterations, seed=1, max_points_per_centroid=1000)
        kmeans.train(keys)
        found["faiss.Kmeans"] = kmeans.index.search(keys, 1)[1][:, 0]

    def two_level() -> None:
        recipe = KMeansRecipe(clusters, len(keys), args.iterations, 1, "two-level")
        found["two-level"] = cluster_keys(stored, recipe, 500_000, verbose=False)[0]

    seconds = side_by_side({"faiss.Kmeans": published, "two-level": two_level}, args.repeats, warm_up=False)
    print(conditions(), f"; {args.threads} thread(s), {len(keys)} x {keys.shape[1]} keys, {clusters} clusters", sep="")
    rows = [
        {
            "k-means": name,
            "seconds": spent,
            "times as fast": seconds["faiss.Kmeans"] / spent,
            "sum of squared distances to the clusters' means": f"{objective(keys, found[name], clusters):.0f}",
        }
        for name, spent in seconds.items()
    ]
    print(table(rows))


def objective(keys: np.ndarray, assignment: np.ndarray, clusters: int) -> float:
    """The objective of k-means (the sum of squared distances) for a given assignment."""
    numbers = torch.from_numpy(np.asarray(assignment, np.int64))
    vectors = torch.from_numpy(keys)
    sums = torch.zeros(clusters, keys.shape[1]).index_add_(0, numbers, vectors)
    means = sums / torch.bincount(numbers, minlength=clusters).clamp(min=1)[:, None]
    return float(sum((part - means[n]).square().sum() for part, n in zip(vectors.split(65536), numbers.split(65536))))


if __name__ == "__main__":
    run(main)
