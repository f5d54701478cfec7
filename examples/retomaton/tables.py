"""The paper's tables from a sweep's results.

The perplexity of every method and clustering at round shares of searches saved, interpolated between the points of each
curve, and the share of searches that a method saves at kNN-LM's perplexity.

`--best knnlm` prints the lambda and temperature with which a strategy has its lowest perplexity, for scripts."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from fairseq.errors import BadFlag
from fairseq.evaluation.results_files import read_sweep
from fairseq.evaluation.sweep_curves import NAMES, Curve, Naming, curves_of, first_setting, named_groups
from fairseq.evaluation.sweep_figures import PAPER, PAPER_FILE
from fairseq.files.atomic_io import atomic_write, read_json
from fairseq_cli.entry import cli_entry

SHARES = (0, 10, 30, 50, 60, 70, 80, 90)
NEAR_ZERO = 0.5  # a point that saves less than this percentage is also used for 0 %


def at(curve: Curve, share: float) -> float | None:
    """Perplexity at a percentage of searches saved, linear between points; None beyond them."""
    if share == 0 and curve.xs[0] < NEAR_ZERO:
        return curve.ys[0]
    pairs = list(zip(curve.xs, curve.ys, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(pairs):
        if x0 <= share <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return None


def free_share(curve: Curve, level: float) -> float | None:
    """The largest percentage saved at which the curve is no higher than `level`; None when it never is."""
    best = None
    pairs = list(zip(curve.xs, curve.ys, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise([pairs[0], *pairs]):
        if y1 <= level:
            best = x1
        elif y0 <= level:
            best = x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return best


def markdown(results: dict[str, Any], title: str, published: dict[str, Any] | None = None) -> str:
    """One row a curve; the paper's curves in italics below."""
    methods = (published or {}).get("methods", {})
    curves = curves_of(named_groups(first_setting(results["points"]), Naming.of(results), published=methods))
    knnlm = next((curve for curve in curves if curve.kind == NAMES["knnlm"]), None)
    first = results["points"][0]
    lines = [f"### {title}", ""] if title else []
    lines += [
        f"LM alone: perplexity {results['lm']['perplexity']:.2f} over {results['lm']['count']:,} words. "
        f"k {first['k']}, lambda {first['lmbda']:g}, temperature {first['knn_temp']:g}.",
        "",
        f"| searches saved | {' | '.join(f'{share} %' for share in SHARES)} | most saved | at kNN-LM's perplexity |",
        f"|---|{'--:|' * (len(SHARES) + 2)}",
    ]
    for curve in curves:
        lines.append(row(curve.label, curve, None if curve is knnlm else knnlm))
    for name, pairs in (published or {}).get("methods", {}).items():
        curve = Curve(name, [100 * x for x, _ in pairs], [y for _, y in pairs])
        own = published["methods"].get(NAMES["knnlm"], [[0, 0]]) if published else []
        level = None if name == NAMES["knnlm"] else Curve("", [0.0], [own[0][1]])
        lines.append(row(f"*{name}, published*", curve, level))
    return "\n".join(lines) + "\n"


def row(name: str, curve: Curve, knnlm: Curve | None) -> str:
    """A line of the table."""
    cells = [f"{value:.2f}" if (value := at(curve, share)) is not None else "" for share in SHARES]
    free = free_share(curve, knnlm.ys[0]) if knnlm is not None else None
    ends = [f"{curve.xs[-1]:.0f} %", "" if free is None else f"{free:.0f} %"]
    return f"| {name.replace('|', '/')} | {' | '.join(cells + ends)} |"


def main() -> None:
    """Prints and writes the table, or prints the best setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, help="what fairseq-sweep wrote: PREFIX.json")
    parser.add_argument("--title", default="", help="heads the table")
    parser.add_argument("--paper", choices=PAPER, help="add the paper's curves for this data")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--best", metavar="STRATEGY", help="only print this strategy's best lambda and temperature")
    args = parser.parse_args()
    results = read_sweep(args.results)
    if args.best:
        points = [point for point in results["points"] if point["strategy"] == args.best]
        if not points:
            raise BadFlag("--best", args.best, "a strategy of the results")
        best = min(points, key=lambda point: point["perplexity"])
        print(f"{best['lmbda']:g} {best['knn_temp']:g}")
        return
    text = markdown(results, args.title, read_json(PAPER_FILE)[args.paper] if args.paper else None)
    if args.output:
        with atomic_write(args.output, "w") as stream:
            stream.write(text)
    print("\n" + text, end="")


if __name__ == "__main__":
    cli_entry(main)
