"""Clustering keys: both algorithms against each other, the plan within a bound of memory, and runs that are killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.errors import BadFlag
from fairseq.files.atomic_io import temporary_path
from fairseq.retrieval.clusters import kmeans, kmeans_state, kmeans_two_level
from fairseq.retrieval.clusters.kmeans import KMeansRecipe, Plan, cluster_keys, sample_keys, train_centroids
from fairseq.retrieval.clusters.kmeans_state import KMeansState

DIMENSION = 8


def planted(count: int, centres: int, seed: int = 0, spread: float = 0.05) -> np.ndarray:
    """float16 keys around `centres` points, in random order."""
    generator = np.random.default_rng(seed)
    middle = generator.standard_normal((centres, DIMENSION))
    keys = middle[generator.integers(centres, size=count)] + spread * generator.standard_normal((count, DIMENSION))
    return keys.astype(np.float16)


def cost(keys: np.ndarray, centroids: np.ndarray, assignment: np.ndarray) -> float:
    return float(((keys.astype(np.float32) - centroids[assignment]) ** 2).sum())


def test_lloyd_is_one_call_of_faiss_to_the_bit() -> None:
    keys = planted(3000, 40).astype(np.float32)
    ours = train_centroids(keys, KMeansRecipe(30, 3000, iterations=7, seed=5))
    theirs = faiss.Kmeans(DIMENSION, 30, niter=7, seed=5, min_points_per_centroid=1)
    theirs.train(keys)
    np.testing.assert_array_equal(ours, theirs.centroids)
    many = planted(3000, 40).astype(np.float32)  # more than 256 keys a centroid: FAISS draws a sample of its own
    theirs = faiss.Kmeans(DIMENSION, 3, niter=4, seed=2, min_points_per_centroid=1)
    theirs.train(many)
    np.testing.assert_array_equal(train_centroids(many, KMeansRecipe(3, 3000, 4, 2)), theirs.centroids)


@pytest.mark.parametrize("clusters", [1, 2, 37, 300])
def test_two_level_is_as_good_as_lloyd(clusters: int) -> None:
    keys = planted(6000, 150, spread=0.3).astype(np.float32)
    costs = {}
    for algorithm in kmeans.ALGORITHMS:
        centroids = train_centroids(keys, KMeansRecipe(clusters, len(keys), algorithm=algorithm))
        assert centroids.shape == (clusters, DIMENSION)
        costs[algorithm] = cost(keys, centroids, kmeans_two_level.nearest(keys, centroids))
    assert costs["two-level"] < 1.05 * costs["lloyd"]


def test_refining_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = planted(6000, 150, spread=0.3).astype(np.float32)
    costs = []
    for iterations in (10, 20):  # ten on two levels, then none or ten over neighbours
        state = KMeansState()
        kmeans_two_level._two_levels(keys, 300, 10, 1, state, True)
        if iterations == 20:
            kmeans_two_level.train(keys, 300, 20, 1, state, False)
        centroids = state.arrays["centroids"]
        costs.append(cost(keys, centroids, kmeans_two_level.nearest(keys, centroids)))
    assert costs[1] < 0.97 * costs[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 3), st.integers(0, 100))
def test_any_small_shape_is_clustered(clusters: int, more: int, different: int, seed: int) -> None:
    """Also when most keys are equal and centroids stay without keys."""
    keys = planted(clusters + more, different, seed, spread=0.0)
    recipe = KMeansRecipe(clusters, len(keys), iterations=4, seed=seed, algorithm="two-level")
    assignment, _ = cluster_keys(keys, recipe, batch=16, verbose=False)
    assert assignment.dtype == np.int32
    assert assignment.shape == (len(keys),)
    assert 0 <= assignment.min() <= assignment.max() < clusters
    for key in np.unique(keys, axis=0):  # equal keys are together
        assert len(set(assignment[(keys == key).all(1)])) == 1


def test_refining_takes_keys_to_the_nearest_neighbour() -> None:
    keys = torch.from_numpy(planted(500, 20).astype(np.float32))
    centroids = keys[:60].clone()
    graph = kmeans_two_level.Graph(centroids, seed=1)
    assert graph.neighbours.shape == (30, 60)  # fewer centroids than NEIGHBOURS: all of them
    assigned = torch.zeros(500, dtype=torch.int64)
    moved = kmeans_two_level.refine(keys, graph, assigned)
    exact = torch.cdist(keys, centroids).argmin(1)
    distance = torch.cdist(keys, centroids)
    found, best = (distance.gather(1, number[:, None]) for number in (assigned, exact))
    torch.testing.assert_close(found, best, atol=2e-3, rtol=0)
    for number in torch.unique(assigned).tolist():
        torch.testing.assert_close(moved[number], keys[assigned == number].mean(0), atol=2e-3, rtol=2e-3)


def test_inverted_file_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = planted(5000, 600, spread=0.2)
    monkeypatch.setattr(kmeans, "EXACT_ASSIGNMENT", 100)
    recipe = KMeansRecipe(500, 5000, iterations=4, algorithm="two-level")
    assignment, state = cluster_keys(keys, recipe, batch=700, verbose=False)
    exact = kmeans_two_level.nearest(keys, state.arrays["centroids"])
    assert (assignment == exact).mean() > 0.97
    monkeypatch.setattr(kmeans, "EXACT_ASSIGNMENT", 1000)
    np.testing.assert_array_equal(cluster_keys(keys, recipe, 700, False)[0], exact)


def test_sample_is_distinct_and_in_order() -> None:
    keys = np.arange(500, dtype=np.float32)[:, None]
    sample = sample_keys(keys, KMeansRecipe(2, 100, seed=3), batch=7)[:, 0]
    assert len(sample) == 100
    assert (np.diff(sample) > 0).all()
    np.testing.assert_array_equal(sample_keys(keys, KMeansRecipe(2, 1000), batch=70), keys)


@pytest.mark.parametrize("algorithm", kmeans.ALGORITHMS)
def test_memory_bounds_sample_and_batch(algorithm: str) -> None:
    recipe = KMeansRecipe(100, 10**9, algorithm=algorithm)
    free = Plan.of(recipe, 10**8, 1024, 500_000, None)
    assert (free.sample, free.batch) == (10**8, 500_000)
    bounded = Plan.of(recipe, 10**8, 1024, 500_000, 0.5)
    assert bounded.memory <= 0.5e9
    assert bounded.sample < 130_000
    assert bounded.batch < 70_000
    with pytest.raises(BadFlag, match=r"--memory-gb: found 0.001, expected at least 0\.\d+ for one key a cluster"):
        Plan.of(recipe, 10**8, 1024, 500_000, 0.001)


def test_refusals() -> None:
    with pytest.raises(BadFlag, match="--num-clusters: found 11, expected from 1 to the 10"):
        cluster_keys(planted(50, 5), KMeansRecipe(11, 10), 10)
    with pytest.raises(BadFlag, match="--algorithm: found elkan"):
        cluster_keys(planted(50, 5), KMeansRecipe(2, 10, algorithm="elkan"), 10)


class Killed(Exception):
    pass


def run(keys: np.ndarray, recipe: KMeansRecipe, prefix: Path, **more: Any) -> np.ndarray:
    return cluster_keys(keys, recipe, 300, verbose=False, prefix=str(prefix), datastore={"rows": len(keys)}, **more)[0]


def dying(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`function`, whose call number `calls` ends the run."""
    count = 0

    def called(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return function(*args, **more)

    return called


STAGES = {  # what is called once a step, at which calls the run dies
    "lloyd iterations": ("lloyd", kmeans, "lloyd", (1, 2, 5)),
    "lloyd assignment": ("lloyd", kmeans, "nearest", (1, 3)),
    "cells": ("two-level", kmeans_two_level, "lloyd", (1, 2, 9)),
    "refining": ("two-level", kmeans_two_level, "refine", (1, 2, 3)),
    "assignment": ("two-level", kmeans, "InvertedFile", (1,)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_started_again_gives_the_same(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, module, name, calls = STAGES[stage]
    monkeypatch.setattr(kmeans_state, "SAFE_POINT_SECONDS", 0.0)
    monkeypatch.setattr(kmeans_state, "MOST_OF_THE_TIME", 0)
    monkeypatch.setattr(kmeans, "EXACT_ASSIGNMENT", 10)
    keys, recipe = planted(1500, 60, spread=0.2), KMeansRecipe(40, 1200, iterations=10, algorithm=algorithm)
    whole = run(keys, recipe, tmp_path / "whole")
    for call in calls:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, dying(getattr(module, name), call))
            run(keys, recipe, tmp_path / "killed")
    np.testing.assert_array_equal(run(keys, recipe, tmp_path / "killed"), whole)


def test_work_is_taken_over_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, recipe = planted(900, 30), KMeansRecipe(20, 900, iterations=6)
    first = run(keys, recipe, tmp_path / "run")
    trained = dying(kmeans.lloyd, 1)
    monkeypatch.setattr(kmeans, "lloyd", trained)
    np.testing.assert_array_equal(run(keys, recipe, tmp_path / "run"), first)  # nothing is trained again
    with pytest.raises(Killed):
        run(keys, KMeansRecipe(20, 900, iterations=7), tmp_path / "run")  # another recipe is
    assert not (tmp_path / "run.kmeans.tmp").exists()
    assert not (tmp_path / "run.assignment.tmp").exists()


def test_damaged_state_is_started_afresh(tmp_path: Path) -> None:
    keys, recipe = planted(900, 30), KMeansRecipe(20, 900, iterations=3)
    first = run(keys, recipe, tmp_path / "run")
    for content in (b"", b"PK\x03\x04 no archive", (tmp_path / "run.kmeans.tmp").read_bytes()[:-30]):
        (tmp_path / "run.kmeans.tmp").write_bytes(content)
        np.testing.assert_array_equal(run(keys, recipe, tmp_path / "run"), first)


def test_assignment_cut_short_within_a_batch(tmp_path: Path) -> None:
    keys, recipe = planted(900, 30), KMeansRecipe(20, 900, iterations=3)
    first = run(keys, recipe, tmp_path / "run")
    path = temporary_path(tmp_path / "run.assignment")
    path.write_bytes(path.read_bytes()[: 4 * 450 + 2])
    np.testing.assert_array_equal(run(keys, recipe, tmp_path / "run"), first)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any), st.data())
def test_apportion(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(1, sum(sizes)))
    shares = kmeans_two_level.apportion(np.array(sizes), total)
    assert shares.sum() == total
    assert ((shares >= 0) & (shares <= sizes)).all()


def test_an_assignment_that_a_dead_machine_left_is_made_again(tmp_path: Path) -> None:
    """Numbers that no cluster has cannot be what was written."""
    keys = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    recipe, prefix = KMeansRecipe(5, 100, 3), str(tmp_path / "k")
    whole, _ = cluster_keys(keys, recipe, 50, False, prefix=prefix)
    np.full(100, 77, np.int32).tofile(temporary_path(prefix + ".assignment"))
    again, state = cluster_keys(keys, recipe, 50, False, prefix=prefix)
    np.testing.assert_array_equal(again, whole)
    state.clear()
    assert not list(tmp_path.iterdir())
