"""Clustering keys with k-means: centroids from a sample, then the nearest centroid of
every key.

`lloyd` is FAISS's k-means, as published. `two-level` first makes about sqrt(K) coarse clusters and then clusters each
of them by itself: sqrt(K) times fewer distances, for nearly the same clusters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq.errors import BadFlag
from fairseq.retrieval.faiss_import import require_faiss

logger = logging.getLogger(__name__)

ALGORITHMS = ("lloyd", "two-level")


@dataclass(frozen=True)
class KMeansRecipe:
    """clusters: K; sample: most keys that centroids are computed from; iterations and seed of k-means."""

    clusters: int
    sample: int
    iterations: int = 20
    seed: int = 1
    algorithm: str = "lloyd"


def sample_keys(keys: NDArray[Any], recipe: KMeansRecipe, batch: int) -> NDArray[np.float32]:
    """Distinct keys, at most `recipe.sample` of them, as float32, read in ascending order."""
    count = len(keys)
    if recipe.sample >= count:
        chosen = np.arange(count)
    else:
        generator = np.random.default_rng(recipe.seed)
        chosen = np.sort(generator.choice(count, recipe.sample, replace=False, shuffle=False))
    sample = np.empty((len(chosen), keys.shape[1]), np.float32)
    for start in range(0, len(chosen), batch):
        sample[start : start + batch] = keys[chosen[start : start + batch]]
    return sample


def train_centroids(sample: NDArray[np.float32], recipe: KMeansRecipe, verbose: bool = False) -> NDArray[np.float32]:
    """(K, D) float32 centroids of `sample` (n, D); BadFlag when there are fewer keys than clusters."""
    if not 1 <= recipe.clusters <= len(sample):
        raise BadFlag("--num-clusters", recipe.clusters, f"from 1 to the {len(sample)} sampled keys")
    if recipe.algorithm == "lloyd":
        return _lloyd(sample, recipe.clusters, recipe, verbose)
    if recipe.algorithm == "two-level":
        return _two_level(sample, recipe, verbose)
    raise BadFlag("--algorithm", recipe.algorithm, " or ".join(ALGORITHMS))


def _lloyd(points: NDArray[np.float32], count: int, recipe: KMeansRecipe, verbose: bool = False) -> NDArray[np.float32]:
    faiss = require_faiss()
    gpu = hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0
    kmeans = faiss.Kmeans(
        points.shape[1],
        count,
        niter=recipe.iterations,
        seed=recipe.seed,
        verbose=verbose,
        gpu=gpu,
        min_points_per_centroid=1,  # only a threshold for FAISS's warning
    )
    kmeans.train(points)
    centroids: NDArray[np.float32] = kmeans.centroids
    return centroids


def _two_level(sample: NDArray[np.float32], recipe: KMeansRecipe, verbose: bool) -> NDArray[np.float32]:
    coarse_count = max(1, round(recipe.clusters**0.5))
    coarse = _lloyd(sample, coarse_count, recipe, verbose)
    nearest = np.concatenate(list(assign(sample, coarse, len(sample))))
    order = np.argsort(nearest, kind="stable")
    sizes = np.bincount(nearest, minlength=coarse_count)
    shares = allot(sizes, recipe.clusters)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    parts = []
    for number in tqdm(range(coarse_count), unit="coarse clusters", disable=None if verbose else True):
        points = sample[order[bounds[number] : bounds[number + 1]]]
        if shares[number] == len(points):
            parts.append(points)
        elif shares[number]:
            parts.append(_lloyd(points, int(shares[number]), recipe))
    return np.concatenate(parts)


def allot(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Distributes `total` clusters over groups in proportion to their sizes; never more than a group has points.

    Largest remainders first; needs total <= sum of sizes."""
    exact = sizes * (total / sizes.sum())
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - shares), kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    shares = np.minimum(shares, sizes)
    missing = total - shares.sum()
    room = np.cumsum(sizes - shares)  # rounding may have hit full groups: fill the others from the left
    return shares + np.diff(np.minimum(room, missing), prepend=0)


def assign(keys: NDArray[Any], centroids: NDArray[np.float32], batch: int) -> Iterator[NDArray[np.int64]]:
    """Yields, for each `batch` of keys in order, the number of the nearest centroid, (n,) int64."""
    faiss = require_faiss()
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    for start in range(0, len(keys), batch):
        _, nearest = index.search(np.asarray(keys[start : start + batch], np.float32), 1)
        yield nearest[:, 0]


def cluster_keys(keys: NDArray[Any], recipe: KMeansRecipe, batch: int, verbose: bool = True) -> NDArray[np.int32]:
    """(N,) int32: the cluster of every key (N, D)."""
    sample = sample_keys(keys, recipe, batch)
    logger.info(
        "k-means (%s): %d clusters of %d keys (%.2f GB as float32), %d iterations",
        recipe.algorithm,
        recipe.clusters,
        len(sample),
        sample.nbytes / 1e9,
        recipe.iterations,
    )
    centroids = train_centroids(sample, recipe, verbose)
    del sample
    result = np.empty(len(keys), np.int32)
    done = 0
    with tqdm(total=len(keys), unit="keys", unit_scale=True, disable=None if verbose else True) as progress:
        for part in assign(keys, centroids, batch):
            result[done : done + len(part)] = part
            done += len(part)
            progress.update(len(part))
    return result
