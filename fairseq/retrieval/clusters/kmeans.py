"""Clustering keys with k-means (the RetoMaton paper, section 4.1; the original's `kmeans.py`): centroids from a sample,
then the nearest centroid of every key.

`lloyd` is FAISS's k-means, as published. `two-level` compares keys with neighbouring centroids only
(`kmeans_two_level`). Both continue after a kill (`kmeans_state`)."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq.errors import BadFlag
from fairseq.retrieval.clusters import kmeans_two_level
from fairseq.retrieval.clusters.kmeans_state import KMeansState
from fairseq.retrieval.clusters.kmeans_two_level import InvertedFile, lloyd, nearest
from fairseq.retrieval.datastore import read_keys
from fairseq.sizes import size_text

logger = logging.getLogger(__name__)

ALGORITHMS = ("lloyd", "two-level")
EXACT_ASSIGNMENT = 1024  # clusters up to which two-level compares keys with all centroids in the final assignment
FAISS_SAMPLE = 256  # keys per cluster beyond which FAISS's k-means draws a sample of its own, and copies it
KEY_BYTES = {"lloyd": 0, "two-level": 24}  # memory per sampled key for its cell, position and centroid


@dataclass(frozen=True)
class KMeansRecipe:
    """clusters: K; sample: largest number of keys that centroids are computed from; iterations and seed of k-means."""

    clusters: int
    sample: int
    iterations: int = 20
    seed: int = 1
    algorithm: str = "lloyd"


@dataclass(frozen=True)
class Plan:
    """Sizes with which a recipe is run. sample, batch: number of keys in memory at a time; memory: bytes needed,
    without the results for N keys."""

    sample: int
    batch: int
    memory: int

    @classmethod
    def of(cls, recipe: KMeansRecipe, count: int, dimension: int, batch: int, memory_gb: float | None) -> Plan:
        """The plan for `count` keys. If `memory_gb` is given, sample and batch are reduced to fit.

        BadFlag when there are fewer keys than clusters, or when the memory is too small for one key per cluster."""
        if recipe.algorithm not in ALGORITHMS:
            raise BadFlag("--algorithm", recipe.algorithm, " or ".join(ALGORITHMS))
        row = 4 * dimension
        sample, batch = min(recipe.sample, count), min(batch, count)
        if not 1 <= recipe.clusters <= sample:
            raise BadFlag("--num-clusters", recipe.clusters, f"from 1 to the {sample} sampled keys")
        fixed = 3 * recipe.clusters * row  # centroids, their sums or an index of them, and their neighbours
        if recipe.algorithm == "lloyd" and sample > FAISS_SAMPLE * recipe.clusters:
            fixed += FAISS_SAMPLE * recipe.clusters * row
        key = row + KEY_BYTES[recipe.algorithm]
        if memory_gb is not None:
            available = int(memory_gb * 1e9) - fixed
            if available < key * recipe.clusters:
                need = 1.005 * (fixed + key * recipe.clusters) / 1e9  # rounded up
                raise BadFlag("--memory-gb", memory_gb, f"at least {need:.3g} for one key a cluster")
            sample, batch = min(sample, available // key), max(1, min(batch, available // (2 * row)))
        return cls(sample, batch, fixed + max(sample * key, 2 * batch * row))


def sample_keys(
    keys: NDArray[Any], recipe: KMeansRecipe, batch: int, source: str = "the keys"
) -> NDArray[np.float32]:
    """Distinct keys, at most `recipe.sample` of them, as float32, read in ascending order; `source` is their file."""
    count = len(keys)
    if recipe.sample >= count:
        chosen = np.arange(count)
    else:
        generator = np.random.default_rng(recipe.seed)
        chosen = np.sort(generator.choice(count, recipe.sample, replace=False, shuffle=False))
    sample = np.empty((len(chosen), keys.shape[1]), np.float32)
    for start in range(0, len(chosen), batch):
        sample[start : start + batch] = read_keys(keys, chosen[start : start + batch], source)
    return sample


def train_centroids(
    sample: NDArray[np.float32], recipe: KMeansRecipe, verbose: bool = False, state: KMeansState | None = None
) -> NDArray[np.float32]:
    """(K, D) float32 centroids of `sample` (n, D), continuing from `state`."""
    state = state or KMeansState()
    if recipe.algorithm == "lloyd":
        _train_lloyd(sample, recipe, state, verbose)
    else:
        kmeans_two_level.train(sample, recipe.clusters, recipe.iterations, recipe.seed, state, verbose)
    return state.arrays["centroids"]


def _train_lloyd(sample: NDArray[np.float32], recipe: KMeansRecipe, state: KMeansState, verbose: bool) -> None:
    """FAISS's k-means, one iteration per call; the centroids equal those of a single call to the bit."""
    done = int(state.arrays.get("iteration", 0))
    hidden = None if verbose else True
    steps = range(done, recipe.iterations)
    for iteration in tqdm(steps, desc="k-means", initial=done, total=recipe.iterations, disable=hidden):
        before = {"init_centroids": state.arrays["centroids"]} if iteration else {}
        centroids = lloyd(sample, recipe.clusters, 1, recipe.seed, **before)
        state.update(centroids=centroids, iteration=iteration + 1)


def cluster_keys(
    keys: NDArray[Any],
    recipe: KMeansRecipe,
    batch: int,
    verbose: bool = True,
    memory_gb: float | None = None,
    prefix: str | None = None,
    datastore: dict[str, Any] | None = None,
    source: str = "the keys",
) -> tuple[NDArray[np.int32], KMeansState]:
    """The cluster of every key of `keys` (N, D), (N,) int32, and the state to `clear` when the results have been
    written.

    prefix: of the files from which a run with the same recipe and the same `datastore` (a description) continues.
    source: the file of the keys, which must be finite (BadFile)."""
    count, dimension = keys.shape
    plan = Plan.of(recipe, count, dimension, batch, memory_gb)
    _log_plan(plan, recipe, count)
    recipe = replace(recipe, sample=plan.sample)
    identity = {**asdict(recipe), "size": count, "dimension": dimension, "batch": plan.batch, "datastore": datastore}
    state = KMeansState(prefix, identity)
    if not bool(state.arrays.get("trained", False)):
        if state.arrays:
            logger.info("continuing from %s", state.path)
        centroids = train_centroids(sample_keys(keys, recipe, plan.batch, source), recipe, verbose, state)
        state.update(final=True, centroids=centroids, trained=True)
    return _assign(keys, state, recipe, plan.batch, verbose, source), state


def _log_plan(plan: Plan, recipe: KMeansRecipe, count: int) -> None:
    said = "k-means (%s): %d clusters of %d of %d keys, %d iterations, about %s of memory"
    logger.info(said, recipe.algorithm, recipe.clusters, plan.sample, count, recipe.iterations, size_text(plan.memory))
    if plan.sample < min(recipe.sample, count):
        logger.warning("--memory-gb: centroids come from %d keys, not from %d", plan.sample, min(recipe.sample, count))


def _assign(
    keys: NDArray[Any], state: KMeansState, recipe: KMeansRecipe, batch: int, verbose: bool, source: str
) -> NDArray[np.int32]:
    """(N,) int32: the nearest centroid of each of `keys`; by an inverted file when `two-level` has many centroids."""
    centroids = state.arrays["centroids"]
    assignment = state.open_assignment(len(keys), batch, len(centroids))
    inverted = None
    if recipe.algorithm != "lloyd" and len(centroids) > EXACT_ASSIGNMENT:
        inverted = InvertedFile(centroids, recipe.seed, "final")
    hidden = None if verbose else True
    bar = tqdm(total=len(keys), initial=assignment.done, unit="keys", unit_scale=True, desc="assigning", disable=hidden)
    with bar:
        for start in range(assignment.done, len(keys), batch):
            some = read_keys(keys, slice(start, start + batch), source)
            assignment.append(nearest(some, centroids) if inverted is None else inverted.nearest(some))
            bar.update(len(some))
    return assignment.result()
