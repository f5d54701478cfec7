"""The end of the demo: every evaluation's results file in one table, one results.json and one figure.

Reads the JSON files that `eval_lm.py --results-json` wrote, named by method: lm.json, knnlm.json, skip-P.json (kNN-LM
with a share P of its searches skipped at random), retomaton-T.json and clusters-T.json (RetoMaton at `--min-knns T`
without and with `--members`). The figure follows Figure 3 of Alon et al. (2022): perplexity over the share of searches
saved, one curve a method; `compare` finds the sentence above it.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.errors import MissingDependency, MissingFile
from fairseq.files.atomic_io import atomic_write, read_json, write_json
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("report")


@dataclass(frozen=True)
class Curve:
    """How one family of results files is named, in the table and in the figure."""

    prefix: str
    label: str
    setting: str
    colour: str
    marker: str


CURVES = (
    Curve("lm", "LM", "", "#444444", ""),
    Curve("knnlm", "kNN-LM", "", "#b35806", "s"),
    Curve("skip", "kNN-LM, random skipping", "--skip-probability {}", "#b35806", "s"),
    Curve("retomaton", "RetoMaton without clusters", "--min-knns {}", "#2b83ba", "o"),
    Curve("clusters", "RetoMaton with clusters", "--min-knns {}", "#1a6b3c", "D"),
)
BY_PREFIX = {curve.prefix: curve for curve in CURVES}

# Where a curve's name stands in the figure: at which point (None: the middle one), how far from it, on which side.
LABELS = {"skip": (None, (-8, 8), "right"), "retomaton": (-1, (9, -2), "left"), "clusters": (-1, (6, -13), "left")}


@dataclass(frozen=True)
class Row:
    """One evaluation. Shares saved are percentages, as the original prints them and as they are; None for the LM."""

    prefix: str
    method: str
    setting: str
    perplexity: float
    saved_printed: float | None
    saved_true: float | None
    tokens_per_second: float


def read_rows(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """All results of a folder in the order of the table, and the raw contents by file name."""
    rows, raw = [], {}
    for order, curve in enumerate(CURVES):
        for path in folder.glob(f"{curve.prefix}*.json"):
            prefix, _, value = path.stem.partition("-")
            if prefix != curve.prefix:
                continue
            result = raw[path.stem] = read_json(path)
            row = Row(
                prefix,
                curve.label,
                curve.setting.format(value),
                result["perplexity"],
                result.get("lookups_saved_percent_printed"),
                result.get("searches_saved_percent"),
                result["tokens_per_second"],
            )
            rows.append((order, row.saved_true or 0.0, row))
    if not rows:
        raise MissingFile(folder / "lm.json", "evaluate first: eval_lm.py ... --results-json FILE")
    return [row for *_, row in sorted(rows, key=lambda item: item[:2])], raw


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table whose columns line up."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} %"

    cells = [("method", "setting", "perplexity", "saved, printed", "saved, true", "tokens/s")]
    for row in rows:
        figures = (f"{row.perplexity:.2f}", share(row.saved_printed), share(row.saved_true))
        cells.append((row.method, row.setting, *figures, f"{row.tokens_per_second:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [("-" * width if i < 2 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    aligned = [[f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths))] for r in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])


def points(rows: list[Row], *prefixes: str) -> tuple[list[float], list[float]]:
    """Percentages of searches truly saved, ascending, and the perplexities at them."""
    pairs = sorted((row.saved_true or 0.0, row.perplexity) for row in rows if row.prefix in prefixes)
    return [x for x, _ in pairs], [y for _, y in pairs]


def compare(rows: list[Row]) -> str:
    """What the figure shows, in one sentence: how many searches RetoMaton saves below kNN-LM's perplexity."""
    baseline = [row.perplexity for row in rows if row.prefix == "knnlm"]
    reto = [row for row in rows if row.prefix in ("retomaton", "clusters")]
    if not baseline or not reto:
        return "Perplexity over the share of searches saved"
    better = [row for row in reto if row.perplexity < baseline[0]]
    if not better:
        return "RetoMaton saves searches, at a price in perplexity"
    best = max(better, key=lambda row: row.saved_true or 0.0)
    return f"RetoMaton skips {best.saved_true or 0.0:.0f} % of kNN-LM's searches at a lower perplexity"


def draw(rows: list[Row], output: Path) -> None:
    """Writes ppl_vs_foss.png and .svg: one labelled curve a method, the LM as a dashed line."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib", "the figure", "pip install -e '.[plot]'") from error
    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "retomaton", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draw_references(axes, rows)
        draw_curves(axes, rows)
        axes.set_xlim(-2, 102)
        axes.margins(y=0.1)
        axes.set_xlabel("share of searches saved (%)  $\\rightarrow$ better")
        axes.set_ylabel("perplexity  $\\leftarrow$ better")
        axes.set_title(compare(rows), loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        for suffix in ("png", "svg"):
            with atomic_write(output / f"ppl_vs_foss.{suffix}") as stream:
                figure.savefig(stream, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
            logger.info("wrote %s", output / f"ppl_vs_foss.{suffix}")


def draw_references(axes: Any, rows: list[Row]) -> None:
    """Horizontal lines at the perplexity of the LM and of kNN-LM with every search."""
    for prefix, style, text in (("lm", "--", "LM, no search"), ("knnlm", ":", "kNN-LM, every search")):
        _, levels = points(rows, prefix)
        for level in levels:
            colour = BY_PREFIX[prefix].colour
            axes.axhline(level, linestyle=style, color=colour, linewidth=1.2)
            x, side = (0, "left") if prefix == "lm" else (101, "right")
            axes.annotate(text, (x, level), (0, 4), textcoords="offset points", color=colour, ha=side, fontsize=9)


def draw_curves(axes: Any, rows: list[Row]) -> None:
    """The three curves, each with its name beside it; random skipping ends, all searches saved, at the LM."""
    for curve in CURVES[2:]:
        xs, ys = points(rows, *(("knnlm", "skip") if curve.prefix == "skip" else (curve.prefix,)))
        if not xs:
            continue
        axes.plot(xs, ys, marker=curve.marker, color=curve.colour, linewidth=2, markersize=5.5, clip_on=False)
        _, lm = points(rows, "lm")
        if curve.prefix == "skip" and lm:
            axes.plot([xs[-1], 100], [ys[-1], lm[0]], color=curve.colour, linewidth=2)
        at, offset, side = LABELS[curve.prefix]
        at = len(xs) // 2 if at is None else at
        axes.annotate(curve.label, (xs[at], ys[at]), offset, textcoords="offset points", color=curve.colour, ha=side)


def main() -> None:
    """Prints the table and writes table.md, results.json and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, help="folder of the files written by eval_lm.py --results-json")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    args = parser.parse_args()
    rows, raw = read_rows(args.results)
    text = table(rows)
    with atomic_write(args.output / "table.md", "w") as stream:
        stream.write(text + "\n")
    write_json(args.output / "results.json", {"finding": compare(rows), "rows": [asdict(r) for r in rows], "runs": raw})
    draw(rows, args.output)
    print(f"\n{text}\n\n{compare(rows)}.")


if __name__ == "__main__":
    cli_entry(main)
