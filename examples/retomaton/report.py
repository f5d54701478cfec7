"""The last stage of the demo: collects all evaluations' results in one table, one results.json and one figure.

Reads the JSON files that `eval_lm.py --results-json` wrote, named by method: lm.json, knnlm.json, skip-P.json (kNN-LM
with a share P of its searches skipped at random), retomaton-T.json and clusters-T.json (RetoMaton at `--min-knns T`
without and with `--members`). The figure follows Figure 3 of Alon et al. (2022): perplexity over the fraction of saved
searches (FoSS), one curve a method; `compare` finds the sentence above it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.errors import MissingFile
from fairseq.evaluation.curve_figure import CurveFigure
from fairseq.evaluation.results_files import read_evaluation
from fairseq.evaluation.sweep_curves import Curve
from fairseq.evaluation.sweep_figures import KNNLM_LEVEL, LM_LEVEL
from fairseq.files.atomic_io import atomic_write, write_json
from fairseq_cli.entry import cli_entry


@dataclass(frozen=True)
class Family:
    """The names of a family of results files in the table and in the figure. kind: the style of its curve."""

    prefix: str
    label: str
    setting: str = ""
    kind: str = ""


FAMILIES = (
    Family("lm", "LM"),
    Family("knnlm", "kNN-LM"),
    Family("skip", "kNN-LM, random skipping", "--skip-probability {}", "kNN-LM"),
    Family("retomaton", "RetoMaton without clusters", "--min-knns {}", "RetoMaton without clusters"),
    Family("clusters", "RetoMaton with clusters", "--min-knns {}", "RetoMaton"),
)


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
    for order, family in enumerate(FAMILIES):
        for path in folder.glob(f"{family.prefix}*.json"):
            prefix, _, value = path.stem.partition("-")
            if prefix != family.prefix:
                continue
            result = raw[path.stem] = read_evaluation(path)
            row = Row(
                prefix,
                family.label,
                family.setting.format(value),
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
    """A sentence about the figure: how many searches RetoMaton saves with a perplexity below kNN-LM's."""
    baseline = [row.perplexity for row in rows if row.prefix == "knnlm"]
    reto = [row for row in rows if row.prefix in ("retomaton", "clusters")]
    if not baseline or not reto:
        return "Perplexity over the share of searches saved"
    better = [row for row in reto if row.perplexity < baseline[0]]
    if not better:
        return "RetoMaton saves searches, at a price in perplexity"
    best = max(better, key=lambda row: row.saved_true or 0.0)
    return f"RetoMaton skips {best.saved_true or 0.0:.0f} % of kNN-LM's searches at a lower perplexity"


def figure(rows: list[Row]) -> CurveFigure:
    """One curve a method, and the perplexities of the LM and of kNN-LM as lines; random skipping ends, with all
    searches skipped, at the LM."""
    named = (("lm", LM_LEVEL), ("knnlm", KNNLM_LEVEL))
    levels = {name: points(rows, prefix)[1][0] for prefix, name in named if points(rows, prefix)[1]}
    curves = []
    for family in FAMILIES[2:]:
        xs, ys = points(rows, *(("knnlm", "skip") if family.prefix == "skip" else (family.prefix,)))
        if family.prefix == "skip" and LM_LEVEL in levels and xs:
            xs, ys = [*xs, 100.0], [*ys, levels[LM_LEVEL]]
        if xs:
            curves.append(Curve(family.label, xs, ys, family.kind))
    return CurveFigure(curves, levels, title=compare(rows))


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
    print(f"\n{text}\n\n{compare(rows)}.", flush=True)
    drawn = figure(rows)
    if drawn.curves:
        drawn.save(str(args.output / "ppl_vs_foss"))


if __name__ == "__main__":
    cli_entry(main)
