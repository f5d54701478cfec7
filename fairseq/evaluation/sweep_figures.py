"""The figures of a sweep, after Figures 3 to 5 of Alon et al. (2022): a curve per method, a curve per clustering, and
heat maps of lambda and temperature. A figure is drawn if the sweep has the points for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fairseq.evaluation.curve_figure import CurveFigure
from fairseq.evaluation.figure_files import FORMATS
from fairseq.evaluation.heat_maps import HeatMaps, panels_of
from fairseq.evaluation.sweep_curves import (
    Curve,
    Naming,
    Point,
    clustering_label,
    curves_of,
    first_setting,
    named_groups,
)
from fairseq.files.atomic_io import read_json

FIGURES = [f"-{name}.{suffix}" for name in ("methods", "clusters", "lmbda-temp") for suffix in FORMATS]
LM_LEVEL, KNNLM_LEVEL = "LM alone", "kNN-LM, all searches"  # horizontal lines to compare curves with
PAPER = ("wikitext103", "law", "law-finetuned")
PAPER_FILE = Path(__file__).with_name("paper_points.json")


def draw_figures(
    results: dict[str, Any], prefix: str, paper: str | None = None, title: str = "", column: bool = False
) -> None:
    """Writes every figure for which the results have points, as PNG, SVG and PDF. Curves are drawn for the first lambda
    and temperature of the sweep. column: for a column of 3.3 inches, with text of 8 points. MissingDependency without
    matplotlib."""
    naming, lm = Naming.of(results), results["lm"]["perplexity"]
    main, heading = first_setting(results["points"]), title
    if len(main) < len(results["points"]):
        chosen = f"lambda {main[0]['lmbda']:g}, temperature {main[0]['knn_temp']:g}"
        heading = f"{title} ({chosen})" if title else chosen
    published = read_json(PAPER_FILE)[paper] if paper else {}
    methods = methods_of(main, naming, published.get("methods", {}))
    curves = [_to_the_lm(curve, methods[curve.label], lm) for curve in curves_of(methods)]
    if curves:
        marks = published.get("methods", {})
        CurveFigure(curves, levels_of(main, lm), marks, heading, column).save(f"{prefix}-methods")
    clusters = curves_of(clusters_of(main, naming), lambda point: clustering_label(point["members"]))
    if clusters:
        CurveFigure(clusters, {}, published.get("clusters", {}), heading, column).save(f"{prefix}-clusters")
    panels = panels_of(results["points"], methods, naming)
    if panels:
        HeatMaps(panels, title, column).save(f"{prefix}-lmbda-temp")


def methods_of(
    points: Sequence[Point], naming: Naming, published: Collection[str] = ()
) -> dict[str, list[Point]]:
    """The points of each method's curve: with the first file of clusters, and without clusters. published: as in
    `named_groups`."""
    first = next((point["members"] for point in points if point["members"] is not None), None)
    return named_groups([point for point in points if point["members"] in (None, first)], naming, "method", published)


def clusters_of(points: Sequence[Point], naming: Naming) -> dict[str, list[Point]]:
    """The points of each clustering's curve, for the first strategy that takes clusters; empty with one clustering."""
    able = [point for point in points if point["min_knns"] is not None]
    if len({point["members"] for point in able}) < 2:
        return {}
    return named_groups([point for point in able if point["series"] == able[0]["series"]], naming, "clusters")


def levels_of(points: Sequence[Point], lm: float) -> dict[str, float]:
    """The perplexities that curves are compared with: the LM's, and that of kNN-LM with a search at every token."""
    knnlm = {point["perplexity"] for point in points if point["strategy"] == "knnlm"}
    levels = {LM_LEVEL: lm} | ({KNNLM_LEVEL: knnlm.pop()} if len(knnlm) == 1 else {})
    return {name: level for name, level in levels.items() if math.isfinite(level)}


def _to_the_lm(curve: Curve, points: list[Point], lm: float) -> Curve:
    """The curve of random skipping, extended to 100 % saved, where it is the LM; other curves unchanged."""
    if all(point["strategy"] != "random_skip" for point in points) or curve.xs[-1] >= 100 or lm == math.inf:
        return curve
    return Curve(curve.label, [*curve.xs, 100.0], [*curve.ys, lm], curve.kind)
