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
from collections.abc import Callable, Collection, Iterable, Sequence
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
ALWAYS = 9_999_999  # the usual value of --min-knns for "search at every token"
MEASURED = frozenset(
    "perplexity loss_base2 count tokens searches searches_saved_percent lookups_saved_percent_printed mean_candidates "
    "retrieval_cpu_seconds".split()
)
NO_PART_OF_A_CURVE = MEASURED | {"strategy", "series", "members", "lmbda", "knn_temp", "seed"}
SAVING_FLAGS = ("min_knns", "target_foss", "skip_probability")  # for results files without this field


@dataclass(frozen=True)
class Curve:
    """A named curve: percentages of saved searches, ascending, and the perplexities at them. kind: the name without the
    user's labels, by which curves get the styles of the paper's methods."""

    label: str
    xs: list[float]
    ys: list[float]
    kind: str = ""


@dataclass(frozen=True)
class Naming:
    """The names of curves, and the flags in which the points of a curve differ. labels: names by `--label` of a
    strategy (as typed, or without its flags), of a file of clusters, or of `none`; saving_flags: for each strategy, the
    flags that decide how many searches are saved."""

    labels: dict[str, str] = field(default_factory=dict)
    saving_flags: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, results: dict[str, Any]) -> Naming:
        """From the fields of a sweep's results file."""
        return cls(results.get("labels", {}), results.get("saving_flags", {}))

    def method(self, point: Point) -> str:
        """The name of a point's strategy."""
        name: str = point["strategy"]
        return self.labels.get(point["series"], self.labels.get(name, NAMES.get(name, name)))


def first_setting(points: Sequence[Point]) -> list[Point]:
    """The points with the lambda and temperature of the first one; the others are for heat maps."""
    return [point for point in points if all(point[name] == points[0][name] for name in ("lmbda", "knn_temp"))]


def curves_of(groups: dict[str, list[Point]], kind: Callable[[Point], str] | None = None) -> list[Curve]:
    """A curve for each group of `named_groups`. kind: function from a point to the kind of its curve, by default the
    method. Points without a finite perplexity are left out with a warning."""
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
    points: Iterable[Point],
    naming: Naming,
    by: Literal["both", "method", "clusters"] = "both",
    published: Collection[str] = (),
) -> dict[str, list[Point]]:
    """The points of each curve by its name, in the order in which curves first occur. by: whether names consist of the
    method (where there is only one file of clusters), the clusters (where there is only one method), or both.
    published: names of published curves that are shown beside these.

    BadFlag when --label gives two curves one name."""
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(naming.method(point), []).append(point)
    clusters = clustering_names([point["members"] for same in methods.values() for point in same], naming.labels)
    groups: dict[tuple[str, ...], list[Point]] = {}
    names: dict[tuple[str, ...], str] = {}
    for method, same in methods.items():
        splits = _splitting_flags(same, naming)
        clustered = method in published or any(point["members"] is not None for point in same)
        for point in same:
            key = (method, _family(point), repr(point["members"]), *(repr(point.get(name)) for name in splits))
            groups.setdefault(key, []).append(point)
            if key not in names:
                flags = [setting_text(name, point[name], values) for name, values in splits.items() if name in point]
                title = _title(point, method, clusters, naming.labels, by, clustered)
                text = ", ".join([title, *flags])
                names[key] = "".join(c if can_be_shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)
    for one, other in itertools.combinations(names, 2):
        if names[one] == names[other]:
            raise BadFlag("--label", f"{names[one]!r} for two curves", "a name of its own for each")
    return {names[key]: group for key, group in groups.items()}


def saving_flag(points: Sequence[Point], naming: Naming) -> str | None:
    """The flag in which the points of a curve differ: the first flag that decides how many searches are saved and has
    several values; None when there is none."""
    for point in points:
        for name in naming.saving_flags.get(point["strategy"], SAVING_FLAGS):
            if len(_values(points, name)) > 1:
                return name
    return None


def clustering_names(paths: Iterable[str | None], labels: dict[str, str]) -> dict[str | None, str]:
    """The name of each clustering: the paper's name for it, inferred from the file's name; the file's name where two
    files would otherwise have the same name."""
    names: dict[str | None, str] = {}
    automatic = {path: clustering_label(path) for path in dict.fromkeys(paths)}
    files = {path: os.path.basename((path or NO_MEMBERS).rstrip("/")) for path in automatic}
    for path in automatic:
        unique = [some[path] for some in (automatic, files) if list(some.values()).count(some[path]) == 1]
        names[path] = labels.get(NO_MEMBERS if path is None else path, [*unique, str(path)][0])
    return names


def clustering_label(path: str | None) -> str:
    """The name of a clustering, inferred from its file's name: `..._k1000000_members.pkl` is k-means 1M,
    `..._merge15_members.pkl` is greedy merging of 15 neighbours."""
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
    """A flag and its value, for a figure; for a file only its base name, where that differs from the other values'."""
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


def _title(
    point: Point, method: str, clusters: dict[str | None, str], labels: dict[str, str], by: str, clustered: bool
) -> str:
    """The name of a point's curve, without its flags; clustered: whether a curve of the method with clusters is
    shown too."""
    name = clusters[point["members"]]
    if by == "clusters":
        return name
    if _without(point) and NO_MEMBERS in labels:
        return f"{method}, {name}"
    if _without(point) and clustered:
        return method + WITHOUT
    if point["members"] is None or (by == "method" and point["members"] not in labels):
        return method
    return f"{method}, {name}"


def _splitting_flags(points: Sequence[Point], naming: Naming) -> dict[str, list[Any]]:
    """The flags in which the curves of a method differ, with their values."""
    along = saving_flag(points, naming)
    names = dict.fromkeys(name for point in points for name in point if name not in NO_PART_OF_A_CURVE)
    values = {name: _values(points, name) for name in names if name != along}
    return {name: different for name, different in values.items() if len(different) > 1}


def _values(points: Iterable[Point], name: str) -> list[Any]:
    """The different values of a flag, in the order of the points."""
    return list({repr(point[name]): point[name] for point in points if name in point}.values())


def _family(point: Point) -> str:
    """The strategy's name, but kNN-LM for random skipping: kNN-LM is random skipping with probability 0, so that their
    points are on one curve."""
    return "knnlm" if point["strategy"] == "random_skip" else point["strategy"]


def _without(point: Point) -> bool:
    """Whether a strategy that could use clusters has none."""
    return point["members"] is None and point["min_knns"] is not None
