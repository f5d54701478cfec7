"""The points of a sweep as named curves: perplexity over the fraction of saved searches (FoSS), after Figures 3 to 5 of
Alon et al. (2022).

Along a curve one flag changes, the one that decides how many searches are saved (`--min-knns` for RetoMaton). Strategy,
clusters, k and all other flags are the same for the points of a curve; where two curves of a strategy differ in a flag,
its value is a part of their names."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fairseq.errors import BadFlag
from fairseq.flag_types import can_be_shown

logger = logging.getLogger(__name__)

Point = dict[str, Any]

NAMES = {
    "knnlm": "kNN-LM",
    "random_skip": "kNN-LM",
    "adaptret": "AdaptRet",
    "retomaton": "RetoMaton",
    "retomaton_adaptret": "RetoMaton with AdaptRet",
    "retomaton_chains": "RetoMaton with chains",
    "retomaton_chains_adaptret": "chains with AdaptRet",
}
WITHOUT = " without clusters"
NO_MEMBERS = "none"
ALWAYS = 9_999_999  # the value of --min-knns that everybody types for "search at every token"
MEASURED = frozenset(
    "perplexity loss_base2 count tokens searches searches_saved_percent lookups_saved_percent_printed mean_candidates "
    "walk_cpu_seconds".split()
)
NO_PART_OF_A_CURVE = MEASURED | {"strategy", "series", "members", "lmbda", "knn_temp", "seed"}
SAVING_FLAGS = ("min_knns", "target_foss", "skip_probability")  # for results that do not say it themselves


@dataclass(frozen=True)
class Curve:
    """A named curve: percentages of saved searches, ascending, and the perplexities at them. `kind` is the name without
    the user's labels, by which curves get the look of the paper's."""

    label: str
    xs: list[float]
    ys: list[float]
    kind: str = ""


@dataclass(frozen=True)
class Naming:
    """How curves are named and what their points have in common. labels: names by `--label`, of a strategy as typed or
    without its flags, of a file of clusters, or of `none`; saving_flags: for each strategy, which of its flags decide
    how many searches are saved."""

    labels: dict[str, str] = field(default_factory=dict)
    saving_flags: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: dict[str, Any]) -> Naming:
        """As a sweep's results file says."""
        return cls(results.get("labels", {}), results.get("saving_flags", {}))

    def method(self, point: Point) -> str:
        """The name of a point's strategy."""
        name: str = point["strategy"]
        return self.labels.get(point["series"], self.labels.get(name, NAMES.get(name, name)))


def first_setting(points: Sequence[Point]) -> list[Point]:
    """The points with the lambda and temperature of the first one; the others are for heat maps."""
    return [point for point in points if all(point[name] == points[0][name] for name in ("lmbda", "knn_temp"))]


def curves_of(groups: dict[str, list[Point]], kind: Callable[[Point], str] | None = None) -> list[Curve]:
    """A curve for each group of `named_groups`; its kind is the method, if no other function of its points is given.
    Points whose perplexity is no number are left out with a warning."""
    curves = []
    for label, points in groups.items():
        pairs = sorted({(point["searches_saved_percent"], point["perplexity"]) for point in points})
        finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if len(finite) < len(pairs):
            logger.warning("%s: %d points of infinite perplexity are left out", label, len(pairs) - len(finite))
        if finite:
            own = (kind or method_kind)(points[0])
            curves.append(Curve(label, [x for x, _ in finite], [y for _, y in finite], own))
    return curves


def method_kind(point: Point) -> str:
    """The method as the paper calls it, and whether it uses clusters."""
    return Naming().method(point) + (WITHOUT if _without(point) else "")


def named_groups(
    points: Iterable[Point], naming: Naming, by: Literal["both", "method", "clusters"] = "both"
) -> dict[str, list[Point]]:
    """The points of each curve by its name, in the order in which curves first occur. `by` says what is named: the
    method (where there is only one file of clusters), the clusters (where there is only one method), or both.

    BadFlag when --label gives two curves one name."""
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(naming.method(point), []).append(point)
    clusters = clustering_names([point["members"] for same in methods.values() for point in same], naming.labels)
    groups: dict[tuple[str, ...], list[Point]] = {}
    names: dict[tuple[str, ...], str] = {}
    for method, same in methods.items():
        splits = _splitting_flags(same, naming)
        for point in same:
            key = (method, _family(point), repr(point["members"]), *(repr(point.get(name)) for name in splits))
            groups.setdefault(key, []).append(point)
            if key not in names:
                flags = [setting_text(name, point[name], values) for name, values in splits.items() if name in point]
                text = ", ".join([_title(point, method, clusters, naming.labels, by), *flags])
                names[key] = "".join(c if can_be_shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)
    for one, other in itertools.combinations(names, 2):
        if names[one] == names[other]:
            raise BadFlag("--label", f"{names[one]!r} for two curves", "a name of its own for each")
    return {names[key]: group for key, group in groups.items()}


def saving_flag(points: Sequence[Point], naming: Naming) -> str | None:
    """The flag that changes along the curves of a method: the first that decides about searches and has several
    values."""
    for point in points:
        for name in naming.saving_flags.get(point["strategy"], SAVING_FLAGS):
            if len(_values(points, name)) > 1:
                return name
    return None


def clustering_names(paths: Iterable[str | None], labels: dict[str, str]) -> dict[str | None, str]:
    """How the entries were clustered, as the paper calls it, from the name of each file; the file's name where that
    does not tell two files apart."""
    names: dict[str | None, str] = {}
    automatic = {path: clustering_label(path) for path in dict.fromkeys(paths)}
    files = {path: os.path.basename((path or NO_MEMBERS).rstrip("/")) for path in automatic}
    for path in automatic:
        told_apart = [known[path] for known in (automatic, files) if list(known.values()).count(known[path]) == 1]
        names[path] = labels.get(NO_MEMBERS if path is None else path, [*told_apart, str(path)][0])
    return names


def clustering_label(path: str | None) -> str:
    """The clusters that a file's name tells of: `..._k1000000_members.pkl` is k-means 1M, `..._merge15_members.pkl` is
    greedy merging of 15 neighbours."""
    if path is None:
        return WITHOUT.strip()
    name = os.path.basename(path.rstrip("/"))
    for ending in (".pkl", "_members", "_clusters"):
        name = name.removesuffix(ending)
    merged = re.search(r"merge([0-9]+)", name)
    if merged:
        return f"greedy, K {merged[1]}"
    count = re.search(r"_k([0-9]+)$", name)
    return name if count is None else "k-means " + re.sub("000$", "K", re.sub("000000$", "M", count[1]))


def setting_text(name: str, value: Any, among: Iterable[Any] = ()) -> str:
    """A flag and its value, for people; of a file its name, where that tells it from the other values."""
    flag = name.replace("_", "-")
    if name == "min_knns":
        return "always searching" if value is not None and value >= ALWAYS else f"{flag} {value}"
    if isinstance(value, bool):
        return flag if value else f"no {flag}"
    if isinstance(value, float):
        return f"{flag} {value:g}" if float(f"{value:g}") == value else f"{flag} {value}"
    if isinstance(value, str):
        bases = [os.path.basename(str(other)) for other in among]
        return f"{flag} {os.path.basename(value) if bases.count(os.path.basename(value)) == 1 else value}"
    return f"{flag} {value}"


def _title(point: Point, method: str, clusters: dict[str | None, str], labels: dict[str, str], by: str) -> str:
    name = clusters[point["members"]]
    if by == "clusters":
        return name
    if _without(point):
        return f"{method}, {name}" if NO_MEMBERS in labels else method + WITHOUT
    if point["members"] is None or (by == "method" and point["members"] not in labels):
        return method
    return f"{method}, {name}"


def _splitting_flags(points: Sequence[Point], naming: Naming) -> dict[str, list[Any]]:
    """The flags in which the curves of a method differ, with their values."""
    along = saving_flag(points, naming)
    names = dict.fromkeys(name for point in points for name in point if name not in NO_PART_OF_A_CURVE)
    values = {name: _values(points, name) for name in names if name != along}
    return {name: known for name, known in values.items() if len(known) > 1}


def _values(points: Iterable[Point], name: str) -> list[Any]:
    """The different values of a flag, in the order of the points."""
    return list({repr(point[name]): point[name] for point in points if name in point}.values())


def _family(point: Point) -> str:
    """kNN-LM is random skipping that skips nothing: their points are one curve."""
    return "knnlm" if point["strategy"] == "random_skip" else point["strategy"]


def _without(point: Point) -> bool:
    """Whether a strategy that could use clusters has none."""
    return point["members"] is None and point["min_knns"] is not None
