"""R of an evaluation: the time of `eval_lm.py` without the language model's part, divided by the time of one batched
FAISS search of all queries, with the same index, k, probe and threads, measured alternately. 1 is a kNN-LM without any
overhead; a strategy that saves half of the searches at no cost would have 0.5.

Takes the flags of eval_lm.py, for instance

    python benchmarks/evaluation.py data-bin --path checkpoint_best.pt --gen-subset valid --dstore-filename dstore16 \\
        --indexfile knn.index --k 1024 --probe 32 --knn-sim-func do_not_recomp_l2 --no-load-keys --members members.pkl
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import faiss
import torch
from timing import clock, conditions, run, table

from fairseq import options
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.retrieval.index.faiss_files import faiss_errors
from fairseq.retrieval.open_stores import require_stores
from fairseq_cli import eval_lm

SETTINGS = {
    "kNN-LM": ["--no-pointer"],
    "RetoMaton without clusters": ["--min-knns", "1"],
    "RetoMaton with clusters": ["--min-knns", "1", "--members"],
    "the same, always searching": ["--min-knns", "9999999", "--members"],
}
TARGETS = {"kNN-LM": "1.05", "the same, always searching": "1.3"}


def main() -> None:
    """Evaluates each setting `--repeats` times, a bare search before each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--members", help="clusters; without them only the first two settings run")
    own, flags = parser.parse_known_args()
    eval_lm.Stopwatch.clock = staticmethod(clock)
    torch.set_num_threads(own.threads)
    faiss.omp_set_num_threads(own.threads)
    settings = {
        name: [*more, own.members] if "--members" in more else more
        for name, more in SETTINGS.items()
        if own.members or "--members" not in more
    }
    index, args = _opened(flags)
    scoring = LMScoring(_parsed([*flags, *SETTINGS["kNN-LM"]]))
    queries = torch.cat([s.queries for batch in scoring.batches() for s in scoring.score(batch)]).float().numpy()
    index.search(queries[:64], args.k)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for _ in range(own.repeats):
        for name, more in settings.items():
            started = clock()
            index.search(queries, args.k)
            search = clock() - started
            runs[name].append({**eval_lm.main(_parsed([*flags, *more])), "search": search})
    print(conditions(), f"; {own.threads} thread(s), {len(queries)} queries, {index.ntotal} entries", sep="")
    print(table([_row(name, figures) for name, figures in runs.items()]))


def _parsed(flags: list[str]) -> argparse.Namespace:
    parser = options.get_eval_lm_parser()
    return options.parse_args_and_arch(parser, [*flags, "--knnlm", "--no-progress-bar"])


def _opened(flags: list[str]) -> tuple[Any, argparse.Namespace]:
    args = _parsed(flags)
    require_stores(args)
    with faiss_errors(args.indexfile, "read"):
        index = faiss.read_index(args.indexfile)
        faiss.extract_index_ivf(index).nprobe = args.probe
    return index, args


def _row(name: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats."""
    saved = figures[0]["searches_saved_percent"] / 100
    tokens = figures[0]["num_tokens"]
    ratios = [run["retrieval_seconds"] / run["search"] for run in figures]
    return {
        "setting": name,
        "perplexity": figures[0]["perplexity"],
        "searches saved": f"{100 * saved:.1f} %",
        "LM ms/token": statistics.median(run["lm_seconds"] for run in figures) / tokens * 1e3,
        "retrieval ms/token": statistics.median(run["retrieval_seconds"] for run in figures) / tokens * 1e3,
        "one search ms/token": statistics.median(run["search"] for run in figures) / tokens * 1e3,
        "R": statistics.median(ratios),
        "R from ... to": f"{min(ratios):.2f} ... {max(ratios):.2f}",
        "R at most": TARGETS.get(name, f"{1 - saved + 0.15:.2f}"),
    }


if __name__ == "__main__":
    run(main)
