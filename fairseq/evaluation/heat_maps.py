"""Perplexity over lambda and temperature: a heat map for each method, the best setting framed and named."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.evaluation.figure_files import COLUMN, LINE, POINTS, WIDE, Size, save_figure, text_width, wrapped
from fairseq.evaluation.sweep_curves import MEASURED, Naming, Point, saving_flag, setting_text

logger = logging.getLogger(__name__)

WORST_PERCENT = 20.0  # end of the colour scale, so that a few very bad cells do not use up the colours
MOST_PANELS = 6


@dataclass(frozen=True)
class Panel:
    """A heat map: perplexity[row][column] over the lambdas (rows) and temperatures (columns)."""

    label: str
    lmbdas: list[float]
    temperatures: list[float]
    perplexity: list[list[float]]

    def best(self) -> tuple[float, int, int]:
        """The lowest perplexity, its row and its column."""
        return min((value, y, x) for y, row in enumerate(self.perplexity) for x, value in enumerate(row))

    def cells(self) -> Iterator[tuple[tuple[int, int], float]]:
        """((row, column), perplexity) of each cell."""
        for row, values in enumerate(self.perplexity):
            yield from (((row, column), value) for column, value in enumerate(values))

    def caption(self, font: float, width: float) -> str:
        """The method and its best setting, in lines of at most `width` points."""
        value, y, x = self.best()
        best = f"best {cell_text(value)} at lambda {self.lmbdas[y]:g}, T {self.temperatures[x]:g}"
        return "\n".join(wrapped(text, font, width) for text in (self.label, best))


def panels_of(points: Sequence[Point], methods: dict[str, list[Point]], naming: Naming) -> list[Panel]:
    """A panel for each method, at the first setting of its curve, if lambda or temperature varies there."""
    panels = []
    for label, curve in methods.items():
        first = curve[0]
        same = [point for point in points if _setting(point) == _setting(first)]
        cells = {(point["lmbda"], point["knn_temp"]): point["perplexity"] for point in same}
        lmbdas, temperatures = sorted({lmbda for lmbda, _ in cells}), sorted({temp for _, temp in cells})
        whole = len(cells) == len(lmbdas) * len(temperatures) and all(map(math.isfinite, cells.values()))
        if len(cells) < 2 or not whole:
            continue
        rows = [[cells[lmbda, temperature] for temperature in temperatures] for lmbda in lmbdas]
        along = saving_flag(curve, naming)
        at = f", {setting_text(along, first[along])}" if along and along in first else ""
        panels.append(Panel(label + at, lmbdas, temperatures, rows))
    if len(panels) > MOST_PANELS:
        logger.warning("heat maps of the first %d of %d methods are drawn", MOST_PANELS, len(panels))
    return panels[:MOST_PANELS]


def _setting(point: Point) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name not in MEASURED | {"lmbda", "knn_temp"}}


@dataclass(frozen=True)
class HeatMaps:
    """Panels in rows of two, or below each other in a column's figure."""

    panels: Sequence[Panel]
    title: str = ""
    column: bool = False

    def save(self, path: str) -> None:
        """Writes path.png, path.svg and path.pdf."""
        save_figure(path, self.size(), self.draw)

    def size(self) -> Size:
        """As high as the rows of numbers need it to be."""
        base = self._base()
        most = max(len(panel.lmbdas) for panel in self.panels)
        lines = max(6.0, 1.25 * most) + 5 + max(self._caption(panel).count("\n") for panel in self.panels)
        title = wrapped(self.title, base.font, POINTS * base.width - 10, bold=True).count("\n") + bool(self.title)
        return Size(base.width, 0.1, base.font, base.dpi).with_lines(lines * self._rows() + title)

    def draw(self, figure: Any) -> None:
        """Draws on a matplotlib figure of the right size. Colours: how far a perplexity is above its panel's best."""
        size, image = self.size(), None
        grid = figure.subplots(self._rows(), self._columns(), squeeze=False)
        for axes, panel in zip(grid.flat, self.panels, strict=False):
            image = self._draw_panel(axes, panel, size)
        for axes in grid.flat[len(self.panels) :]:
            axes.remove()
        place = {"location": "bottom" if self.column else "right", "shrink": 0.9, "aspect": 30, "extend": "max"}
        bar = figure.colorbar(image, ax=list(grid.flat[: len(self.panels)]), ticks=range(0, 21, 5), **place)
        bar.set_label("perplexity above the best (%)")
        if self.title:
            title = wrapped(self.title, size.font, POINTS * size.width - 10, bold=True)
            figure.suptitle(title, x=0.01, ha="left", fontsize=size.font, fontweight="bold")

    def _base(self) -> Size:
        return COLUMN if self.column else WIDE

    def _columns(self) -> int:
        """Two panels side by side if the cells are then wide enough for numbers, or if they are not even with one."""
        side_by_side = self._numbers_fit(2) or not self._numbers_fit(1)
        return 2 if not self.column and len(self.panels) > 1 and side_by_side else 1

    def _rows(self) -> int:
        return math.ceil(len(self.panels) / self._columns())

    def _width(self, columns: int) -> float:
        """The least width of a heat map in points: what remains beside the colour bar and the labels of the lambdas."""
        base = self._base()
        return (POINTS * base.width - (0 if self.column else 7 * base.font)) / columns - 5.5 * base.font

    def _numbers_fit(self, columns: int) -> bool:
        font = self._base().font
        widest = max(len(panel.temperatures) * widest_number(panel, font) for panel in self.panels)
        return widest < 0.9 * self._width(columns)

    def _caption(self, panel: Panel) -> str:
        return panel.caption(self._base().font, self._width(self._columns()))

    def _draw_panel(self, axes: Any, panel: Panel, size: Size) -> Any:
        from matplotlib.patches import Rectangle

        best, y, x = panel.best()
        above = [[100 * (value / best - 1) for value in row] for row in panel.perplexity]
        image = axes.imshow(above, cmap="viridis_r", vmin=0, vmax=WORST_PERCENT, aspect="auto", origin="lower")
        axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, edgecolor="black", linewidth=1.6))
        self._name_ticks(axes, panel, size)
        axes.set_xlabel("temperature T")
        axes.set_ylabel("lambda")
        axes.set_title(self._caption(panel), loc="left")
        if self._numbers_fit(self._columns()):
            for (row, column), value in panel.cells():
                colour = "white" if above[row][column] > WORST_PERCENT / 2 else "black"
                axes.text(column, row, cell_text(value), color=colour, ha="center", va="center")
        return image

    def _name_ticks(self, axes: Any, panel: Panel, size: Size) -> None:
        """Labels the ticks: vertically where numbers are wider than a cell, and only some of them where they still
        would overlap."""
        names = [f"{value:g}" for value in panel.temperatures]
        cell = self._width(self._columns()) / len(names)
        upright = max(text_width(name, size.font) for name in names) > 0.75 * cell
        step = math.ceil(LINE * size.font / cell) if upright else 1
        axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if upright else 0)
        axes.set_yticks(range(len(panel.lmbdas)), [f"{value:g}" for value in panel.lmbdas])


def widest_number(panel: Panel, font: float) -> float:
    """The largest width of a panel's numbers in points."""
    return max(text_width(cell_text(value), font) for _, value in panel.cells())


def cell_text(perplexity: float) -> str:
    """The perplexity with about four digits."""
    digits = 2 if perplexity < 100 else 1 if perplexity < 1000 else 0
    return f"{perplexity:.{digits}f}"
