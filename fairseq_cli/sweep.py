"""`fairseq-sweep`: a table, and figures, of many settings of retrieval for the scores that `eval_lm.py` kept."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fairseq import options, utils
from fairseq.errors import BadFile, BadFlag
from fairseq.evaluation.figure_files import require_matplotlib
from fairseq.evaluation.results_files import digest_of_points
from fairseq.evaluation.sweep import Setting, Sweep
from fairseq.evaluation.sweep_curves import ALWAYS, MEASURED, NO_MEMBERS, Naming, named_groups
from fairseq.evaluation.sweep_figures import FIGURES, PAPER, draw_figures
from fairseq.files.atomic_io import atomic_write, read_json
from fairseq.files.outputs import FIGURE_KINDS, RESULTS, Kind, claimed, text_beginning
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout, title_of_choice
from fairseq.flag_types import (
    Parser,
    natural_int,
    output_prefix,
    positive_float,
    positive_int,
    row_count,
    seed_int,
    shown_text,
    unit_float,
)
from fairseq.knnlm import open_stores
from fairseq.refusals import add_force
from fairseq.registry import declared_actions, unknown_name
from fairseq.retrieval.datastore.peer_files import name_datastore
from fairseq.retrieval.datastore.provenance import SOURCE, check_query_model, datastore_identity
from fairseq.retrieval.index.interface import add_index_arg
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.retrieval.saved.searches import saved_searches, search_identity
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("fairseq_cli.sweep")

DESCRIPTION = """From the scores that eval_lm.py --save-scores kept, the perplexity and the searches saved of every
combination of the strategies, clusters and values named, in one table, and figures of it. A strategy may come with its
own flags, in quotes; of several values each is a point.

A figure has a curve for each strategy, file of clusters and set of flags. The points of a curve differ in the flag that
decides how many searches are saved, such as --min-knns or --skip-probability."""
EXAMPLE = """%(prog)s --scores scores --dstore-filename dstore --indexfile index --members none members.pkl \
--strategy retomaton "random_skip --skip-probability 0.25 0.5 0.75" --output sweep --figure sweep"""

COLUMNS = ("strategy", "members", "min_knns", "k", "lmbda", "knn_temp", "perplexity", "loss_base2")
SHARES = ("searches_saved_percent", "lookups_saved_percent_printed", "mean_candidates", "retrieval_cpu_seconds")

PER_STRATEGY = ("min_knns", "max_knns", "target_foss")  # of eval_lm.py, and allowed beside a strategy's name


def get_parser() -> argparse.ArgumentParser:
    """eval_lm's retrieval flags, some of which take several values here."""
    parser = Parser(prog="fairseq-sweep", description=DESCRIPTION, layout=Layout({}, example=EXAMPLE))
    add = parser.add_argument_group("Scores and datastore").add_argument
    add("--scores", required=True, metavar="DIR", help="what eval_lm.py --save-scores wrote")
    add("--dstore-filename", metavar="PREFIX", help="prefix of the datastore's files")
    add("--dstore-dir", metavar="DIR", help="folder of knn-transformers' files, in place of their names")
    add("--dstore-size", type=row_count, metavar="N", help="entries of the datastore (default: known from its files)")
    add("--dstore-fp16", action="store_true", help="the keys are float16")
    add("--no-load-keys", action="store_true", help="do not open the keys")
    add("--move-dstore-to-mem", action="store_true", help="copy the values (and keys, if opened) into memory")
    group = parser.add_argument_group("Search index")
    add = group.add_argument
    add("--indexfile", metavar="FILE", help="FAISS index of the datastore's keys")
    add_index_arg(group)
    add("--probe", default=8, type=positive_int, help="lists of the index that a search visits")
    add("--knn-sim-func", metavar="NAME",
        help="do_not_recomp_l2 (the index's distance), dot; default: exact L2 from the keys")
    add("--faiss-metric-type", default="l2", metavar="NAME", help="metric of the index: l2 or ip")
    add("--knnlm-gpu", action="store_true", help="search and follow pointers on the GPU")
    add = parser.add_argument_group("What to combine (each takes several values)").add_argument
    add("--strategy", nargs="+", default=["retomaton"], metavar="'NAME FLAGS'",
        help="strategies, with their flags, which --strategy NAME --help shows")
    add("--members", nargs="+", metavar="FILE",
        help=f"clusters; {NO_MEMBERS}: without (default: {NO_MEMBERS}, or those of --dstore-dir)")
    add("--min-knns", nargs="+", type=natural_int, default=[1], metavar="N", help="search below N kept entries")
    add("--k", nargs="+", type=positive_int, default=[1024], metavar="N", help="neighbours of a search")
    add("--lmbda", nargs="+", type=unit_float, default=[0.25], metavar="L",
        help="weights of retrieval (default: 0.25, where eval_lm.py has 0, the LM alone)")
    add("--knn-temp", nargs="+", type=positive_float, default=[1.0], metavar="T", help="temperatures of retrieval")
    add = parser.add_argument_group("The same for all").add_argument
    add("--max-knns", type=positive_int, metavar="N", help="most pointers to follow (default: --k)")
    add("--lockstep-tokens", type=positive_int, default=65536, metavar="N", help="tokens that advance together")
    add("--seed", type=seed_int, default=1, help="seed of random strategies")
    add("--user-dir", metavar="DIR", help="folder of a Python package with extensions; its code is executed")
    group = parser.add_argument_group("Output")
    add = group.add_argument
    add(
        "--output",
        required=True,
        type=output_prefix(".json", ".csv", ".md"),
        metavar="PREFIX",
        help="writes PREFIX.json, PREFIX.csv, PREFIX.md and PREFIX.settings/",
    )
    add("--no-progress-bar", action="store_true", help="no progress bar")
    add_force(group)
    add = parser.add_argument_group("Figures").add_argument
    add(
        "--figure",
        type=output_prefix(*FIGURES),
        metavar="PREFIX",
        help="draw PREFIX-methods, -clusters and -lmbda-temp, as .png, .svg and .pdf; knnlm and random_skip share "
        "one curve, on which knnlm is the point where nothing is skipped",
    )
    add("--column", action="store_true", help="for a column of 3.3 inches, with text of 8 points")
    add("--label", nargs="+", type=shown_text, default=[], metavar="WHAT=NAME",
        help="names of curves; WHAT is a strategy or a file of clusters as typed, a strategy without "
        f"its flags, or {NO_MEMBERS}: --label 'retomaton_chains --pool 1024=small pool'")
    add("--paper", choices=PAPER, help="add the paper's points for this data to the figures, as hollow marks")
    add("--title", default="", type=shown_text, help="heads the figures")
    return parser


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Every combination of values that needs an evaluation pass of its own. Values of flags that a strategy does not
    use are not combined with it."""
    for text in args.strategy:
        for name, own, typed in expand_strategy(text):
            strategy = RETRIEVER_REGISTRY[name]
            if strategy.sequential and not strategy.meets_target and typed.get("target_foss") is not None:
                raise BadFlag("--strategy", text, "a strategy that reads --target-foss", "list values of --min-knns")
            members = args.members if strategy.sequential else [NO_MEMBERS]
            min_knns = [typed["min_knns"]] if "min_knns" in typed else args.min_knns if strategy.sequential else [None]
            for path, least, k in itertools.product(members, min_knns, args.k):
                values = {
                    **eval_lm_defaults(),
                    **vars(args),
                    **own,
                    **typed,
                    "strategy": name,
                    "members": None if path == NO_MEMBERS else path,
                    "min_knns": 1 if least is None else least,
                    "k": k,
                }
                settings = {name: values[name] for name in ("strategy", "members", "k", "max_knns")}
                settings |= {"min_knns": least, "seed": args.seed, "series": text}
                settings |= {name: values[name] for name in own | typed}
                yield Setting(settings, argparse.Namespace(**values))


def naming_of(args: argparse.Namespace, all_settings: list[Setting]) -> Naming:
    """The names of the curves of these settings by `--label`; BadFlag where a label matches no curve, or two curves get
    the same name."""
    strategies = {one.settings["series"]: one.settings["strategy"] for one in all_settings}
    accepted = dict.fromkeys([*strategies, *strategies.values(), *args.members])
    labels: dict[str, str] = {}
    for text in args.label:
        parts = [(text[:at], text[at + 1 :].strip()) for at, character in enumerate(text) if character == "="]
        what, name = next((part for part in reversed(parts) if part[0] in accepted and part[1]), ("", ""))
        if not name or what in labels:
            expected = f"WHAT=NAME, once for each WHAT, which is one of: {', '.join(accepted)}"
            raise BadFlag("--label", repr(text), expected)
        labels[what] = name
    saving = {name: list(RETRIEVER_REGISTRY[name].saving_flags) for name in strategies.values()}
    settings = [one.settings for one in all_settings]
    naming = Naming(labels, saving)
    names = named_groups(settings, naming).keys()
    for what, name in labels.items():
        if not any(name in curve for curve in names):
            raise BadFlag("--label", f"{what}={name}", "a name that a curve has", "leave it out")
    return naming


def _refuse_figure_flags(args: argparse.Namespace) -> None:
    for name in ("column", "paper", "title"):
        if getattr(args, name) and not args.figure:
            raise BadFlag(f"--{name}", "no --figure beside it", "--figure PREFIX too")


def eval_lm_defaults() -> dict[str, Any]:
    """The values of eval_lm's retrieval flags that a sweep does not set."""
    parser = Parser(add_help=False)
    options.add_knn_eval_args(parser)
    return {action.dest: action.default for action in parser._actions}


def expand_strategy(text: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, defaults of its own flags, values that were typed) for each combination of the values in
    "NAME --flag VALUE VALUE ..."."""
    name, *words = _strategy_words(text)
    own = Parser(add_help=False)
    RETRIEVER_REGISTRY[name].add_args(own)
    defaults = {action.dest: action.default for action in own._actions}
    parser = Parser(prog=f"fairseq-sweep --strategy {name}", add_help=False, allow_abbrev=False)
    options.add_knn_eval_args(parser)
    RETRIEVER_REGISTRY[name].add_args(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append([word])
        elif flags:
            flags[-1].append(word)
        else:
            raise BadFlag("--strategy", repr(text), "a name, then flags and their values")
    choices = [[[flag, value] for value in values] or [[flag]] for flag, *values in flags]
    for combination in itertools.product(*choices):
        typed = vars(parser.parse_args(list(itertools.chain.from_iterable(combination))))
        others = sorted(set(typed) - set(defaults) - set(PER_STRATEGY))
        if others:
            found = f"{text!r} with --{others[0].replace('_', '-')}"
            expected = "the strategy's own flags, " + ", ".join("--" + flag.replace("_", "-") for flag in PER_STRATEGY)
            raise BadFlag("--strategy", found, expected, "give the others to fairseq-sweep, outside the quotes")
        yield name, defaults, typed


def _strategy_words(text: str) -> list[str]:
    try:
        words = shlex.split(text) or [""]
    except ValueError as error:  # a quotation that is not closed, say
        raise BadFlag("--strategy", repr(text), f"words as a shell reads them ({error})") from error
    if words[0] not in RETRIEVER_REGISTRY:
        raise unknown_name("--strategy", repr(words[0]), RETRIEVER_REGISTRY)
    return words


def parse_args() -> argparse.Namespace:
    """The command line; --help also shows the own flags of the strategies named beside it."""
    parser = get_parser()
    if {"-h", "--help"} & set(sys.argv):
        early = Parser(add_help=False, allow_abbrev=False)
        early.add_argument("--strategy", nargs="+", default=[])
        early.add_argument("--user-dir")
        named = early.parse_known_args()[0]
        utils.import_user_module(named)
        names = [_strategy_words(text)[0] for text in named.strategy]
        for name in dict.fromkeys(names):  # strategies share flags, so this is for the help alone
            group = parser.add_argument_group(title_of_choice("--strategy", name) + ", in the quotes")
            group._group_actions.extend(declared_actions(RETRIEVER_REGISTRY[name]))
    return options.parse_with_extensions(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates all settings, writing the results after each of them; returns the content of PREFIX.json."""
    utils.import_user_module(args)
    _refuse_figure_flags(args)
    name_datastore(args)
    if not isinstance(args.members, list):
        args.members = [args.members or NO_MEMBERS]
    settings = list(settings_of(args))
    naming = naming_of(args, settings)
    if args.figure:
        require_matplotlib()
    with claimed("--output", args.output, _files(args.output)), claimed("--figure", args.figure, _figure_files(args)):
        return _sweep(args, settings, naming)


def _files(prefix: str) -> dict[str, Kind]:
    """The files that a sweep writes, besides the folder of saved results."""
    table = text_beginning("a sweep's table", "strategy,", "LM alone:")
    return {prefix + ".json": RESULTS, prefix + ".csv": table, prefix + ".md": table}


def _figure_files(args: argparse.Namespace) -> dict[str, Kind]:
    """The figures that a sweep may draw."""
    return {f"{args.figure}{name}": FIGURE_KINDS[name.rpartition(".")[2]] for name in FIGURES}


def _sweep(args: argparse.Namespace, settings: list[Setting], naming: Naming) -> dict[str, Any]:
    scores = ScoreCache.open(args.scores)
    device = torch.device("cuda" if args.knnlm_gpu and torch.cuda.is_available() else "cpu")
    most = argparse.Namespace(**{**vars(args), "k": max(args.k)})
    stores = open_stores(most, scores.dimension, device, scores.vocabulary)
    places = [args.scores] * len(SOURCE)
    check_query_model(args.dstore_filename, scores.info, places)
    for setting in settings:
        RETRIEVER_REGISTRY[setting.args.strategy].check_query_model(setting.args, scores.info, places)
    index_identity = search_identity(args, stores.index)
    identity = {
        "scores": {name: value for name, value in scores.info.items() if name != "command"},
        "searches": index_identity,
        "datastore": datastore_identity(stores.datastore),
        "similarity": [args.knn_sim_func, args.faiss_metric_type],
    }
    identity = json.loads(json.dumps(identity))
    kept = _kept_points(args.output + ".json", identity)
    searches = saved_searches(scores, stores.index, max(args.k), index_identity, device, not args.no_progress_bar)
    sweep = Sweep(scores, searches, stores, args.output + ".settings", identity)
    results: dict[str, Any] = {"identity": identity, "lm": sweep.figures(sweep.lm_log_probs), "points": []}
    results |= vars(naming)
    began = time.perf_counter()
    for number, setting in enumerate(settings, 1):
        points = list(sweep.points(setting, args.lmbda, args.knn_temp))
        results["points"] += points
        logger.info("setting %d of %d: %s", number, len(settings), _summary(points[0]))
        current = {_key(point) for point in results["points"]}
        other = [point for point in kept if _key(point) not in current]
        digest = digest_of_points(json.loads(json.dumps(results["points"])), other)
        write_results(args.output + ".json", {**results, "earlier_points": other, "points_digest": digest}, args)
    logger.info("%d points in %.1f s", len(results["points"]), time.perf_counter() - began)
    write_tables(args.output, results)
    if args.figure:
        draw_figures(results, args.figure, args.paper, args.title, args.column)
    return results


def _kept_points(path: str, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of earlier runs with the same output; BadFile when they are of other scores."""
    if not os.path.exists(path):
        return []
    earlier, remedy = read_json(path, 1 << 30), "choose another --output, or delete this one"
    if not isinstance(earlier, dict) or earlier.get("identity") != identity:
        found = "results of other scores, another index, datastore or --knn-sim-func"
        raise BadFile(path, found, "those of the files named", remedy)
    parts: list[Any] = [earlier.get("points"), earlier.get("earlier_points")]
    points, before = parts
    lists = isinstance(points, list) and isinstance(before, list)
    if not lists or earlier.get("points_digest") != digest_of_points(points, before):
        raise BadFile(path, "points that differ from those that were written", "the results of a sweep", remedy)
    return [*points, *before]


def _key(point: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in point.items() if name not in MEASURED}, sort_keys=True)


def _summary(point: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {point[name]}" for name in COLUMNS[:6] if point[name] is not None)
    return f"{named}: perplexity {point['perplexity']:.4f}, {point['searches_saved_percent']:.2f}% of searches saved"


def write_tables(prefix: str, results: dict[str, Any]) -> None:
    """PREFIX.csv with all columns and PREFIX.md for reading."""
    points = results["points"]
    extra = sorted({name for point in points for name in point} - {*COLUMNS, *SHARES, "series"})
    with atomic_write(prefix + ".csv", "w") as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *SHARES, *extra], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)
    lines = [
        f"LM alone: perplexity {results['lm']['perplexity']:.2f} over {results['lm']['count']} words or tokens.",
        "",
        "| method | clusters | min-knns | k | lambda | T | perplexity | saved | saved, as printed | candidates |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for point in points:
        printed = point["lookups_saved_percent_printed"]
        cells = [
            method_name(point),
            "-" if point["members"] is None else os.path.basename(point["members"].rstrip("/")),
            "-" if point["min_knns"] is None else "always" if point["min_knns"] >= ALWAYS else str(point["min_knns"]),
            *(f"{point[name]:g}" for name in ("k", "lmbda", "knn_temp")),
            f"{point['perplexity']:.2f}",
            f"{point['searches_saved_percent']:.1f} %",
            "-" if printed is None else f"{printed:.1f} %",
            f"{point['mean_candidates']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_write(prefix + ".md", "w") as stream:
        stream.write("\n".join(lines) + "\n")


def method_name(point: dict[str, Any]) -> str:
    """A strategy, with the values of the flags in which its points differ, as far as they are given."""
    columns = {*COLUMNS, *SHARES, "series", "seed", "max_knns", "count", "tokens", "searches"}
    known = [name for name in point if name not in columns and point[name] is not None]
    own = [f"{name} {point[name]}" for name in known if not isinstance(point[name], str)]
    return " ".join([point["strategy"], *own])


def cli_main() -> None:
    """Console entry point."""
    cli_entry(lambda: main(parse_args()), sys.stderr, goes_on=True)


if __name__ == "__main__":
    cli_main()
