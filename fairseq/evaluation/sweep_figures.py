"""A sweep's figures, after Figures 3 to 5 of Alon et al. (2022): perplexity over the share of searches saved, a curve a
method and a curve a clustering, and a heat map of lambda and temperature. Curves differ in line, marker and colour and
carry their names, so that they can be told apart in print; the paper's own points are faint marks of the same kind."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.errors import MissingDependency
from fairseq.files.atomic_io import atomic_write, read_json

logger = logging.getLogger(__name__)

FIGURES = [f"-{name}.{suffix}" for name in ("methods", "clusters", "lmbda-temp") for suffix in ("png", "svg")]
PAPER = ("wikitext103", "law", "law-finetuned")
PAPER_FILE = Path(__file__).with_name("paper_points.json")
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
# Colour-blind safe (Okabe and Ito), dark enough on white; each with a line and a marker of its own.
FIXED = {
    "kNN-LM": ("#b35806", ":", "s"),
    "AdaptRet": ("#7b3294", "-.", "^"),
    "RetoMaton": ("#00664b", "-", "D"),
    "RetoMaton" + WITHOUT: ("#0072b2", "--", "o"),
    WITHOUT.strip(): ("#0072b2", "--", "o"),
}
SPARE = [
    ("#cc3311", "-", "v"), ("#555555", "--", "P"), ("#aa7700", "-.", "X"), ("#ee3377", ":", "*"),
    ("#117733", (0, (5, 1, 1, 1, 1, 1)), "h"), ("#332288", (0, (1, 1)), "<"),
]  # fmt: skip
LABEL_GAP = 0.055  # least distance of two labels, as a share of the axes' height
WORST_PERCENT = 20.0  # the end of the heat maps' scale: a few hopeless cells must not use it up
LOG_RATIO = 3.0  # perplexities further apart than this get a logarithmic axis


@dataclass
class Curve:
    """A named curve: percentages of searches saved, ascending, and the perplexities at them."""

    label: str
    xs: list[float]
    ys: list[float]


def curves_of(points: Iterable[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> list[Curve]:
    """Points grouped by `label`, in the order in which labels first occur."""
    groups: dict[str, set[tuple[float, float]]] = {}
    for point in points:
        groups.setdefault(label(point), set()).add((point["searches_saved_percent"], point["perplexity"]))
    return [Curve(name, [x for x, _ in sorted(pairs)], [y for _, y in sorted(pairs)]) for name, pairs in groups.items()]


def method_label(point: dict[str, Any]) -> str:
    """The method as the paper calls it, with its further flags, and whether it uses clusters."""
    name, _, flags = point["series"].partition(" ")
    label = NAMES.get(name, name)
    if label == name and flags:
        label = f"{name} {flags}"
    return label + (WITHOUT if name == "retomaton" and point["members"] is None else "")


def clustering_label(point: dict[str, Any]) -> str:
    """How the entries were clustered, as the paper calls it, from the name of the file: `..._k1000000_members.pkl` is
    k-means 1M, `..._merge15_members.pkl` is greedy merging of 15 neighbours."""
    if point["members"] is None:
        return "without clusters"
    name = os.path.basename(point["members"].rstrip("/"))
    for ending in (".pkl", "_members", "_clusters"):
        name = name.removesuffix(ending)
    merged = re.search(r"merge([0-9]+)", name)
    if merged:
        return f"greedy, K {merged[1]}"
    count = re.search(r"_k([0-9]+)$", name)
    return name if count is None else "k-means " + re.sub("000$", "K", re.sub("000000$", "M", count[1]))


def draw_figures(results: dict[str, Any], prefix: str, paper: str | None = None, title: str = "") -> None:
    """Writes every figure that the points allow, as PNG and SVG. The curves take the first k, lambda and temperature
    of the sweep; MissingDependency without matplotlib."""
    points, lm = results["points"], results["lm"]["perplexity"]
    fixed = ("k", "lmbda", "knn_temp")
    main = [point for point in points if all(point[name] == points[0][name] for name in fixed)]
    published = read_json(PAPER_FILE)[paper] if paper else {}
    clusterings = list(dict.fromkeys(point["members"] for point in main if point["min_knns"] is not None))
    shown = {None, *[path for path in clusterings if path is not None][:1]}
    methods = curves_of((point for point in main if point["members"] in shown), method_label)
    for curve in methods:
        if curve.label == NAMES["knnlm"]:  # with all searches skipped it is the LM
            curve.xs, curve.ys = [*curve.xs, 100.0], [*curve.ys, lm]
    _save(prefix + "-methods", lambda figure: _curves(figure, methods, lm, published.get("methods", {}), title))
    if len(clusterings) > 1:
        first = next(point["series"] for point in main if point["min_knns"] is not None)
        clustered = curves_of((point for point in main if point["series"] == first), clustering_label)
        marks = published.get("clusters", {})
        _save(prefix + "-clusters", lambda figure: _curves(figure, clustered, None, marks, title))
    panels = _panels(points)
    if panels:
        _save(prefix + "-lmbda-temp", lambda figure: _heat_maps(figure, panels, title), (3.4 * len(panels) + 0.8, 3.4))


def _save(path: str, draw: Callable[[Any], None], size: tuple[float, float] = (7.2, 4.3)) -> None:
    """Draws on a fresh figure and writes it as path.png and path.svg."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib", "a figure", "pip install -e '.[plot]'") from error
    style: dict[Any, Any] = {"font.size": 9.5, "svg.hashsalt": "retomaton", "svg.fonttype": "none"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for suffix in ("png", "svg"):
            with atomic_write(f"{path}.{suffix}") as stream:
                figure.savefig(stream, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
            logger.info("wrote %s.%s", path, suffix)


def _curves(
    figure: Any, curves: list[Curve], lm: float | None, published: dict[str, list[list[float]]], title: str
) -> None:
    axes = figure.add_subplot()
    styles = _styles([curve.label for curve in curves])
    for curve in curves:
        colour, line, marker = styles[curve.label]
        axes.plot(
            curve.xs, curve.ys, color=colour, linestyle=line, marker=marker, linewidth=1.8, markersize=5.5, zorder=3
        )
    for name, pairs in published.items():
        colour, _, marker = styles.get(name, FIXED.get(name, ("#777777", "", ".")))
        xs, ys = [100 * x for x, _ in pairs], [y for _, y in pairs]
        axes.plot(xs, ys, linestyle="", marker=marker, color=colour, alpha=0.3, markersize=6, zorder=2)
    ys = [y for curve in curves for y in curve.ys] + [y for pairs in published.values() for _, y in pairs]
    if max(ys) > LOG_RATIO * min(ys):
        _logarithmic(axes, min(ys), max(ys))
    axes.set_xlim(-3, 103)
    axes.margins(y=0.08)
    if lm is not None:
        axes.axhline(lm, color="#444444", linewidth=1, zorder=1)
        axes.annotate("LM", (0, lm), (0, -3), textcoords="offset points", color="#444444", va="top")
    _frame(axes, title, "faint marks: as published" if published else "")
    figure.draw_without_rendering()  # fixes the limits that the labels' places depend on
    _name_curves(axes, curves, styles)


def _styles(labels: list[str]) -> dict[str, tuple[str, Any, str]]:
    spare = iter(SPARE * (1 + len(labels) // len(SPARE)))
    return {label: FIXED.get(label) or next(spare) for label in labels}


def _logarithmic(axes: Any, least: float, most: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log")
    ticks = [first * 10**power for power in range(8) for first in (1, 1.2, 1.5, 2, 3, 5, 7.5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if least / 1.2 < tick < most * 1.2]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"))


def _frame(axes: Any, title: str, note: str) -> None:
    axes.set_xlabel("share of searches saved (%)  $\\rightarrow$ better")
    axes.set_ylabel("perplexity  $\\leftarrow$ better")
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=8.5, color="#777777")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)


def _name_curves(axes: Any, curves: list[Curve], styles: dict[str, tuple[str, Any, str]]) -> None:
    """Names in a column at the right, each joined to its curve's last point; apart from each other."""
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    wanted = sorted((to_share((curve.xs[-1], curve.ys[-1]))[1], curve.label, curve) for curve in curves)
    places = spread([height for height, *_ in wanted], LABEL_GAP)
    for place, (_, label, curve) in zip(places, wanted, strict=True):
        colour = styles[label][0]
        axes.annotate(
            label,
            (curve.xs[-1], curve.ys[-1]),
            (1.015, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to be at least `gap` apart: groups that collide are centred."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _collide(groups[-2], groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_centre(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _collide(lower: list[float], upper: list[float], gap: float) -> bool:
    return _centre(lower) + gap * (len(lower) + len(upper)) / 2 > _centre(upper)


def _centre(group: list[float]) -> float:
    return sum(group) / len(group)


@dataclass
class Panel:
    """A heat map: perplexity[row][column] over the lambdas (rows) and temperatures (columns)."""

    label: str
    lmbdas: list[float]
    temperatures: list[float]
    perplexity: list[list[float]]


def _panels(points: list[dict[str, Any]]) -> list[Panel]:
    """One for each of (at most four) methods at its first `--min-knns`, if lambda or temperature varies."""
    groups: dict[str, dict[tuple[float, float], float]] = {}
    settings: dict[str, tuple[Any, ...]] = {}
    for point in points:
        label = method_label(point)
        chosen = tuple(point.get(name) for name in ("members", "min_knns", "k", "skip_probability"))
        if settings.setdefault(label, chosen) == chosen:
            groups.setdefault(label, {})[point["lmbda"], point["knn_temp"]] = point["perplexity"]
    panels = []
    for label, cells in list(groups.items())[:4]:
        lmbdas, temperatures = sorted({lmbda for lmbda, _ in cells}), sorted({temp for _, temp in cells})
        if len(cells) > 1 and len(cells) == len(lmbdas) * len(temperatures):
            rows = [[cells[lmbda, temperature] for temperature in temperatures] for lmbda in lmbdas]
            min_knns = settings[label][1]
            full = label if min_knns is None else f"{label}, min-knns {min_knns}"
            panels.append(Panel(full, lmbdas, temperatures, rows))
    return panels


def _heat_maps(figure: Any, panels: list[Panel], title: str) -> None:
    """Side by side; numbers are perplexities, colours say how far above the panel's best, which is framed."""
    from matplotlib.patches import Rectangle

    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    image = None
    for axes, panel in zip(all_axes, panels, strict=True):
        best = min(value for row in panel.perplexity for value in row)
        above = [[100 * (value / best - 1) for value in row] for row in panel.perplexity]
        image = axes.imshow(above, cmap="viridis_r", vmin=0, vmax=WORST_PERCENT, aspect="auto", origin="lower")
        axes.set_xticks(range(len(panel.temperatures)), [f"{value:g}" for value in panel.temperatures])
        axes.set_yticks(range(len(panel.lmbdas)), [f"{value:g}" for value in panel.lmbdas])
        axes.set_xlabel("temperature")
        axes.set_title(panel.label, loc="left", fontsize=9.5)
        size = 8 if len(panel.temperatures) < 7 else 6.5
        for y, row in enumerate(panel.perplexity):
            for x, value in enumerate(row):
                weight = "bold" if value == best else "normal"
                place = {"ha": "center", "va": "center", "fontsize": size, "weight": weight}
                text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
                axes.text(x, y, text, color="white" if above[y][x] > WORST_PERCENT / 2 else "black", **place)
                if value == best:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#cc3311", linewidth=1.6))
    all_axes[0].set_ylabel("lambda")
    bar = figure.colorbar(image, ax=list(all_axes), shrink=0.9, extend="max")
    bar.set_label("perplexity above the best (%)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
