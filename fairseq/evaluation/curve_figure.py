"""Perplexity over the fraction of saved searches (FoSS), as one figure. Curves differ in line, marker and colour, so
that they can be distinguished in print; published points are hollow marks of the same kind. All names are in a legend
beside or below the axes, so that no text can overlap another or a curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.evaluation.figure_files import COLUMN, LINE, POINTS, WIDE, Size, save_figure, text_width, wrapped
from fairseq.evaluation.sweep_curves import WITHOUT, Curve

AXES = ("fraction of saved searches (FoSS, %)", "perplexity (lower is better)")
WIDE_NAMES = 170.0  # points for the names beside the axes of a wide figure
HANDLE = 2.6  # length of a line in the legend, in units of the font's size
LOG_RATIO = 3.0  # perplexities further apart than this get a logarithmic axis
GREY = "#444444"
LEVEL_LINES = ((0, (4, 2)), (0, (1, 2)), (0, (4, 2, 1, 2)))
# Colours of Okabe and Ito and of Tol, which colour-blind people can tell apart, dark enough on white.
PAPER_STYLES: dict[str, tuple[str, Any, str]] = {
    "kNN-LM": ("#b35806", ":", "s"),
    "AdaptRet": ("#7b3294", "-.", "^"),
    "RetoMaton": ("#00664b", "-", "D"),
    "RetoMaton" + WITHOUT: ("#0072b2", "--", "o"),
    WITHOUT.strip(): ("#0072b2", "--", "o"),
}
COLOURS = ("#cc3311", "#555555", "#aa7700", "#ee3377", "#332288")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":", (0, (6, 2)))
MARKERS = ("v", "P", "X", "*", "h", "<", ">", "p", "d", "8", "H")


@dataclass(frozen=True)
class CurveFigure:
    """The content of a figure. curves; levels: horizontal lines at named perplexities; published: points (fraction
    saved, perplexity) by the kind of curve that they belong to; title; column: whether it is sized for a paper's
    column."""

    curves: Sequence[Curve]
    levels: dict[str, float] = field(default_factory=dict)
    published: dict[str, list[list[float]]] = field(default_factory=dict)
    title: str = ""
    column: bool = False

    def save(self, path: str) -> None:
        """Writes path.png, path.svg and path.pdf."""
        save_figure(path, self.size(), self.draw)

    def size(self) -> Size:
        """The figure's size, whose height depends on the title and the legend."""
        base = self._base()
        names, columns = self._legend()
        lines = math.ceil(sum(1.15 + name.count("\n") for name in names) / columns)
        fitting = 0.0 if self.column else (base.height - 0.3) * POINTS / LINE / base.font  # lines of the legend
        return base.with_lines(self._wrapped_title().count("\n") + bool(self.title) + max(0.0, lines - fitting))

    def draw(self, figure: Any) -> None:
        """Draws on a matplotlib figure of the right size."""
        axes, scale = figure.add_subplot(), self._base().font / WIDE.font
        drawn = [*self._draw_curves(axes, scale), *self._draw_levels(axes)]
        lines = [drawn[i] for i in self._order()] + self._draw_published(axes, scale)
        self._set_axes(axes)
        if self.title:
            axes.set_title(self._wrapped_title(), loc="left", fontweight="bold")
        names, columns = self._legend()
        place = "outside lower center" if self.column else "outside right upper"
        look = {"frameon": False, "handlelength": HANDLE, "borderaxespad": 0.2, "labelspacing": 0.4}
        figure.legend(lines, names, loc=place, ncols=columns, columnspacing=1.2, **look)

    def _base(self) -> Size:
        return COLUMN if self.column else WIDE

    def _wrapped_title(self) -> str:
        base = self._base()
        return wrapped(
            self.title, base.font, POINTS * (base.width - 0.7) - (0 if self.column else WIDE_NAMES), bold=True
        )

    def _order(self) -> list[int]:
        """Curves and levels in the order in which they end, the highest first, as the legend names them."""
        ends = [*(curve.ys[-1] for curve in self.curves), *self.levels.values()]
        return sorted(range(len(ends)), key=lambda i: -ends[i])

    def _legend(self) -> tuple[list[str], int]:
        """The legend's texts, broken into lines, and the number of its columns: two if they fit below the axes."""
        base, names = self._base(), [*(curve.label for curve in self.curves), *self.levels]
        names = [names[i] for i in self._order()] + [published_name(name) for name in self._unmatched()]
        if len(self._unmatched()) < len(self.published):
            names.append(HOLLOW)
        handle = (HANDLE + 2.2) * base.font
        if self.column:
            half = math.ceil(len(names) / 2)
            parts = [[text_width(name, base.font) for name in part] for part in (names[:half], names[half:])]
            widths = [max(part, default=0) for part in parts]
            if sum(widths) + 2 * handle < POINTS * base.width:
                return names, 2
        width = POINTS * base.width - handle if self.column else WIDE_NAMES
        return [wrapped(name, base.font, width) for name in names], 1

    def _unmatched(self) -> list[str]:
        """Published curves of a kind that no curve of the figure has."""
        kinds = {curve.kind for curve in self.curves}
        return [name for name in self.published if name not in kinds]

    def _draw_curves(self, axes: Any, scale: float) -> list[Any]:
        lines: list[Any] = []
        for curve, (colour, line, marker) in zip(self.curves, styles_of(self._kinds()), strict=False):
            look = {"color": colour, "linestyle": line, "linewidth": 1.7 * scale, "marker": marker}
            lines += axes.plot(curve.xs, curve.ys, label=curve.label, markersize=5.5 * scale, zorder=3, **look)
        return lines

    def _draw_levels(self, axes: Any) -> list[Any]:
        looks = zip(self.levels.items(), itertools.cycle(LEVEL_LINES))
        return [
            axes.axhline(level, label=name, color=GREY, linestyle=line, linewidth=1, zorder=1)
            for (name, level), line in looks
        ]

    def _draw_published(self, axes: Any, scale: float) -> list[Any]:
        """Draws the published points; returns legend entries for the kinds that no curve has, and one entry that
        explains the marks of the others."""
        hollow = {"markerfacecolor": "none", "markeredgewidth": 0.8, "markersize": 5.5 * scale, "linestyle": ""}
        looks = dict(reversed(list(zip(self._kinds(), styles_of(self._kinds())))))
        lines: list[Any] = []
        unmatched = self._unmatched()
        for name, pairs in self.published.items():
            colour, _, marker = looks[name]
            xs, ys = [100 * x for x, _ in pairs], [y for _, y in pairs]
            drawn = axes.plot(xs, ys, label=published_name(name), color=colour, marker=marker, zorder=2, **hollow)
            lines += drawn if name in unmatched else []
        if len(unmatched) < len(self.published):
            lines += axes.plot([], [], label=HOLLOW, color=GREY, marker="o", **hollow)
        return lines

    def _kinds(self) -> list[str]:
        """The kinds that need a style: those of the curves, then those of published points of other kinds."""
        return [*(curve.kind for curve in self.curves), *self._unmatched()]

    def _set_axes(self, axes: Any) -> None:
        marks = [pair for pairs in self.published.values() for pair in pairs]
        xs = [x for curve in self.curves for x in curve.xs] + [100 * x for x, _ in marks]
        ys = [y for curve in self.curves for y in curve.ys] + [y for _, y in marks] + list(self.levels.values())
        end = max([1.0, *xs])
        axes.set_xlim(-0.03 * end, 1.03 * end)
        axes.margins(y=0.08)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        if max(ys) > LOG_RATIO * min(ys):
            base = self._base()
            logarithmic(axes, min(ys), max(ys), least_gap=1.4 * base.font / (0.6 * POINTS * base.height))
        axes.set_xlabel(AXES[0])
        axes.set_ylabel(AXES[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)


HOLLOW = "hollow marks: as published"


def published_name(name: str) -> str:
    """A published curve's name in the legend."""
    return f"{name}, published"


def styles_of(kinds: Sequence[str]) -> list[tuple[str, Any, str]]:
    """(colour, line, marker) for each curve. The first curve of each of the paper's methods has a fixed style; others
    get the next of three cycles whose lengths (5, 6, 11) have no common divisor, so that 330 styles differ."""
    spare = zip(itertools.cycle(COLOURS), itertools.cycle(LINES), itertools.cycle(MARKERS))
    return [
        PAPER_STYLES[kind] if kind in PAPER_STYLES and kind not in kinds[:i] else next(spare)
        for i, kind in enumerate(kinds)
    ]


def logarithmic(axes: Any, least: float, most: float, least_gap: float) -> None:
    """Makes the y axis logarithmic, with ticks at round perplexities; least_gap: smallest distance of two ticks, as a
    share of the axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log")
    wanted = least_gap * math.log(most / least)  # in logarithms of perplexities
    for firsts in ((1, 1.2, 1.5, 2, 3, 5, 7.5), (1, 1.5, 2, 3, 5, 7.5), (1, 2, 3, 5), (1, 2, 5), (1,)):
        gaps = [math.log(high / low) for low, high in itertools.pairwise([*firsts, 10])]
        if min(gaps) >= wanted:
            break
    step = max(1, math.ceil(wanted / math.log(10)))
    powers = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1, step)
    ticks = [first * 10.0**power for power in powers for first in firsts]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if least / 1.2 < tick < most * 1.2]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 9999 else f"{value:,.0f}"))
