"""Which points of a sweep form a curve, and the curve's name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fairseq.errors import BadFlag
from fairseq.evaluation.sweep_curves import (
    NO_PART_OF_A_CURVE,
    Naming,
    Point,
    clustering_names,
    curves_of,
    first_setting,
    named_groups,
    setting_text,
)
from fairseq.evaluation.sweep_figures import clusters_of, methods_of
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY

KMEANS, GREEDY = "a/kmeans_s1_k400_members.pkl", "a/x_merge15_members.pkl"
NAMING = Naming({}, {name: list(strategy.saving_flags) for name, strategy in RETRIEVER_REGISTRY.items()})


def point(strategy: str, saved: float, perplexity: float = 10.0, **settings: Any) -> Point:
    """A point of a sweep as its results file has it."""
    return {
        "strategy": strategy, "series": strategy, "members": None, "min_knns": None, "k": 8, "max_knns": None,
        "seed": 1, "lmbda": 0.25, "knn_temp": 1.0, **settings,
        "perplexity": perplexity, "loss_base2": 1.0, "count": 9, "tokens": 9, "searches": 9, "mean_candidates": 1.0,
        "searches_saved_percent": saved, "lookups_saved_percent_printed": saved, "retrieval_cpu_seconds": 1.0,
    }  # fmt: skip


def grid(strategy: str, members: tuple[str | None, ...] = (None,), **flags: list[Any]) -> list[Point]:
    """A point for each combination of values, at other savings each."""
    combinations = itertools.product(members, *flags.values())
    return [
        point(strategy, float(i), members=path, **dict(zip(flags, values)))
        for i, (path, *values) in enumerate(combinations)
    ]


def saving(points: list[Point]) -> list[float]:
    return [p["searches_saved_percent"] for p in points]


TAUS = [9999999, 20, 1]
CASES: dict[str, tuple[list[Point], dict[str, int]]] = {  # points; names of the curves and how many points each has
    "RetoMaton with and without clusters": (
        grid("retomaton", (KMEANS, None), min_knns=TAUS),
        {"RetoMaton, k-means 400": 3, "RetoMaton without clusters": 3},
    ),
    "chains, as any strategy": (
        grid("retomaton_chains", (KMEANS, GREEDY, None), min_knns=TAUS),
        {
            "RetoMaton with chains, k-means 400": 3,
            "RetoMaton with chains, greedy, K 15": 3,
            "RetoMaton with chains without clusters": 3,
        },
    ),
    "several values of an own flag": (
        grid("retomaton_chains", pool=[1024, 4096], min_knns=TAUS),
        {f"RetoMaton with chains, pool {pool}": 3 for pool in (1024, 4096)},
    ),
    "two own flags, one of which varies": (
        grid("retomaton_chains", pool=[1024], chain_power=[1.0, 0.25], min_knns=[1]),
        {"RetoMaton with chains, chain-power 1": 1, "RetoMaton with chains, chain-power 0.25": 1},
    ),
    "random skipping continues kNN-LM": (
        [point("knnlm", 0), *grid("random_skip", skip_probability=[0.25, 0.5])],
        {"kNN-LM": 3},
    ),
    "of two flags that save, one is along the curve": (
        grid("retomaton_adaptret", gate_foss=[0.0, 0.5], min_knns=[20, 1]),
        {"RetoMaton with AdaptRet, gate-foss 0": 2, "RetoMaton with AdaptRet, gate-foss 0.5": 2},
    ),
    "the gate alone": (
        grid("retomaton_adaptret", gate_foss=[0.0, 0.5], min_knns=[1]),
        {"RetoMaton with AdaptRet": 2},
    ),
    "AdaptRet by target, two checkpoints of one name": (
        grid("adaptret", adaptret_checkpoint=["a/m.pt", "b/m.pt"], target_foss=[0.0, 0.5, 0.9]),
        {"AdaptRet, adaptret-checkpoint a/m.pt": 3, "AdaptRet, adaptret-checkpoint b/m.pt": 3},
    ),
    "several k": (
        grid("retomaton", k=[256, 1024], min_knns=TAUS),
        {"RetoMaton, k 256": 3, "RetoMaton, k 1024": 3},
    ),
    "a switch": (
        grid("mine", sharp=[True, False], min_knns=TAUS),
        {"mine, sharp": 3, "mine, no sharp": 3},
    ),
    "a strategy of one's own without flags that save": (
        grid("mine", width=[1, 2]),
        {"mine, width 1": 1, "mine, width 2": 1},
    ),
    "the same with default and typed flags": (
        [*grid("mine", min_knns=TAUS, a=[1]), *grid("mine", min_knns=TAUS, a=[2])],
        {"mine, a 1": 3, "mine, a 2": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_curve_for_each_strategy_and_set_of_flags(case: str) -> None:
    points, expected = CASES[case]
    groups = named_groups(points, NAMING)
    assert {name: len(group) for name, group in groups.items()} == expected


def test_one_flag_changes_along_a_curve() -> None:
    """Everything at once: no curve mixes two values of anything but the one flag that saves."""
    points = [p for points, _ in CASES.values() for p in points]
    for name, group in named_groups(points, NAMING).items():
        settings = [{key: repr(value) for key, value in p.items() if key not in NO_PART_OF_A_CURVE} for p in group]
        keys = set().union(*settings)
        varying = {key for key in keys if len({s.get(key) for s in settings if key in s}) > 1}
        assert len(varying) <= 1, (name, varying)
        assert len({p["members"] for p in group}) == 1
    assert sum(map(len, named_groups(points, NAMING).values())) == len(points)


def test_a_strategy_may_say_which_flag_saves() -> None:
    points = grid("periodic", search_every=[2, 4, 8], min_knns=[1])
    assert len(named_groups(points, Naming())) == 3
    (group,) = named_groups(points, Naming({}, {"periodic": ["search_every"]})).values()
    assert len(group) == 3


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"retomaton_chains": "chains"}, {"chains, k-means 400", "chains without clusters"}),
        ({"retomaton_chains": "no", "series": "typed"}, {"typed, k-means 400", "typed without clusters"}),
        ({KMEANS: "400 clusters"}, {"RetoMaton with chains, 400 clusters", "RetoMaton with chains without clusters"}),
        ({"none": "alone"}, {"RetoMaton with chains, k-means 400", "RetoMaton with chains, alone"}),
    ],
)
def test_labels(labels: dict[str, str], expected: set[str]) -> None:
    points = grid("retomaton_chains", (KMEANS, None), min_knns=TAUS)
    points = [{**p, "series": "series"} for p in points]
    assert set(named_groups(points, Naming(labels))) == expected


def test_a_curve_is_called_without_clusters_only_beside_one_of_its_method_with_clusters() -> None:
    points = [*grid("retomaton", (KMEANS,), min_knns=TAUS), *grid("mine", min_knns=TAUS)]
    assert set(named_groups(points, NAMING)) == {"RetoMaton, k-means 400", "mine"}
    alone = grid("retomaton", min_knns=TAUS)
    assert set(named_groups(alone, NAMING)) == {"RetoMaton"}
    assert set(named_groups(alone, NAMING, published={"RetoMaton": []})) == {"RetoMaton without clusters"}
    labelled = [{**p, "series": "mine"} for p in grid("mine", min_knns=TAUS)]
    assert set(named_groups(labelled, Naming({"mine": "Ours"}))) == {"Ours"}
    assert set(named_groups(labelled, Naming({"mine": "Ours", "none": "alone"}))) == {"Ours, alone"}


def test_two_curves_of_one_name_are_refused() -> None:
    points = [*grid("retomaton", min_knns=TAUS), *grid("retomaton_chains", min_knns=TAUS)]
    with pytest.raises(BadFlag, match="'one' for two curves"):
        named_groups(points, Naming({"retomaton": "one", "retomaton_chains": "one"}))


def test_what_the_figures_show() -> None:
    points = [point("knnlm", 0), *grid("retomaton", (KMEANS, GREEDY, None), min_knns=TAUS, k=[8, 16])]
    assert len(methods_of(points, NAMING)) == 5
    assert "RetoMaton, k 8" in methods_of(points, NAMING) and "kNN-LM" in methods_of(points, NAMING)
    assert len(clusters_of(points, NAMING)) == 6 and "greedy, K 15, k 16" in clusters_of(points, NAMING)
    assert clusters_of(grid("retomaton", (KMEANS,), min_knns=TAUS), NAMING) == {}
    varied = [*grid("retomaton", min_knns=TAUS), *grid("retomaton", min_knns=TAUS, lmbda=[0.5])]
    assert first_setting(varied) == varied[:3]


def test_files_of_clusters_are_told_apart() -> None:
    paths = ["a/k_s1_k5000_members.pkl", "a/k_s2_k5000_members.pkl", "b/k_s2_k5000_members.pkl", KMEANS, "own", None]
    expected = ["k_s1_k5000_members.pkl", *paths[1:3], "k-means 400", "own", "without clusters"]
    assert list(clustering_names(paths, {}).values()) == expected


def test_infinite_perplexity_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    points = [point("knnlm", 0.0), point("random_skip", 50.0, float("inf"), skip_probability=0.5)]
    (curve,) = curves_of(named_groups(points, NAMING))
    assert curve.ys == [10.0]
    assert "1 points of infinite perplexity" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("min_knns", 9999999, "always searching"),
        ("min_knns", 1024, "min-knns 1024"),
        ("chain_power", 1 / 3, f"chain-power {1 / 3}"),
        ("chain_power", 4.0, "chain-power 4"),
        ("file", "a/b.pt", "file b.pt"),
    ],
)
def test_texts_of_settings(name: str, value: Any, text: str) -> None:
    assert setting_text(name, value, [value, "a/c.pt"]) == text
