"""`fairseq-adaptret`: trains the network of AdaptRet from scores that `eval_lm.py` kept."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray

from fairseq import options
from fairseq.data import data_utils
from fairseq.data.token_ids import open_vocabulary
from fairseq.errors import BadFile, BadFlag
from fairseq.files.fingerprint import split_fingerprints
from fairseq.files.outputs import ARCHIVE, GATE, claimed, described
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout
from fairseq.flag_types import (
    Parser,
    finite_float,
    output_file,
    output_folder,
    output_name,
    positive_float,
    positive_int,
    row_count,
    seed_int,
    unit_float,
)
from fairseq.knnlm import build_knnlm, open_stores
from fairseq.refusals import add_force
from fairseq.retrieval.datastore.peer_files import name_datastore
from fairseq.retrieval.datastore.provenance import SOURCE, check_query_model
from fairseq.retrieval.index.interface import add_index_arg
from fairseq.retrieval.retrievers.adaptret_network import FEATURES, AdaptRetRecipe, TrainingData, train
from fairseq.retrieval.retrievers.ngrams import NgramTable, count_ngrams
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.retrieval.saved.searches import saved_searches, search_identity
from fairseq.scored_sequences import lockstep_groups
from fairseq_cli.entry import cli_entry

DESCRIPTION = """Trains the network of AdaptRet, which decides which tokens are worth a search, from the scores of a
held-out split that eval_lm.py --save-scores DIR --save-features kept. Afterwards: eval_lm.py --strategy adaptret
--adaptret-checkpoint FILE --target-foss 0.5."""
LAYOUT = Layout(
    {
        "Scores and datastore": """
            --scores --dstore-filename --dstore-dir --dstore-size --dstore-fp16 --no-load-keys --move-dstore-to-mem""",
        "Search index": "--indexfile --index --k --probe --knn-sim-func --faiss-metric-type --knn-temp --knnlm-gpu",
        "Counts of n-grams": "--data --ngram-split --ngrams --ngram-memory",
        "Network and training": "",
        "Output": "--save --results-json --no-progress-bar",
        "Other flags": "--user-dir --force --help",
    },
    example="%(prog)s --scores scores --dstore-filename dstore --indexfile index --data data-bin --save adaptret.pt",
)
logger = logging.getLogger("fairseq_cli.adaptret")

ARTICLES = 60  # pieces into which running text is divided, as many as the paper has articles; 1 in 10 is held out


def get_parser() -> argparse.ArgumentParser:
    """eval_lm's retrieval flags, and the recipe of the network; the defaults are the paper's."""
    parser = Parser(prog="fairseq-adaptret", description=DESCRIPTION, layout=LAYOUT)
    recipe = AdaptRetRecipe()
    add = parser.add_argument_group("Files").add_argument
    add("--scores", required=True, metavar="DIR", help="scores of a held-out split with features")
    add("--save", required=True, type=output_name, metavar="FILE", help="checkpoint to write")
    add("--dstore-filename", metavar="PREFIX", help="prefix of the datastore's files")
    add("--dstore-dir", metavar="DIR", help="folder of knn-transformers' files, in place of their names")
    add("--indexfile", metavar="FILE", help="its index")
    add_index_arg(parser)
    add("--data", metavar="DIR", help="binarised data whose training text is counted for freq and fert")
    add("--ngram-split", default="train", metavar="SPLIT", help="split to count")
    add("--ngrams", type=output_folder, metavar="DIR", help="folder for the counts (default: FILE.ngrams)")
    add("--ngram-memory", type=positive_float, default=2.0, metavar="GB", help="memory for counting")
    add("--results-json", type=output_file, metavar="FILE", help="write figures, times and versions here")
    add_force(parser)
    add("--no-progress-bar", action="store_true", help="no progress bar")
    add("--user-dir", metavar="DIR", help="folder of a Python package with extensions; its code is executed")
    add = parser.add_argument_group("As for eval_lm.py").add_argument
    add("--k", type=positive_int, default=1024, help="neighbours of a search")
    add("--probe", type=positive_int, default=8, help="lists of the index that a search visits")
    add("--knn-sim-func", metavar="NAME",
        help="do_not_recomp_l2 (the index's distance), dot; default: exact L2 from the keys")
    add("--faiss-metric-type", default="l2", metavar="NAME", help="metric of the index: l2 or ip")
    add("--knn-temp", type=positive_float, default=1.0, metavar="T", help="temperature of retrieval")
    add("--dstore-size", type=row_count, metavar="N", help="entries of the datastore")
    add("--dstore-fp16", action="store_true", help="the keys are float16")
    add("--no-load-keys", action="store_true", help="do not open the keys")
    add("--move-dstore-to-mem", action="store_true", help="copy the values (and keys, if opened) into memory")
    add("--knnlm-gpu", action="store_true", help="search on the GPU")
    add = parser.add_argument_group("Network and training").add_argument
    add("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="what the network sees")
    add("--epochs", type=positive_int, default=recipe.epochs, help="passes over the tokens")
    add("--batch-size", type=positive_int, default=recipe.batch, help="tokens of an update")
    add("--lr", type=positive_float, default=recipe.lr, help="learning rate of Adam")
    add("--l1", type=finite_float, default=recipe.l1, help="penalty on retrieval's weight")
    add("--hidden", type=positive_int, default=recipe.hidden, help="width of the hidden layers")
    add("--layers", type=positive_int, default=recipe.layers, help="hidden layers")
    add("--dropout", type=unit_float, default=recipe.dropout, help="dropout")
    add("--held-out", type=unit_float, default=recipe.held_out, help="share of the text on which epochs are compared")
    add("--seed", type=seed_int, default=recipe.seed, help="seed of split, weights, order and dropout")
    return parser


def main(args: argparse.Namespace) -> None:
    """Searches (or reads saved searches), counts n-grams, trains; returns the figures for the results file."""
    if not 0 < args.held_out < 1:
        raise BadFlag("--held-out", args.held_out, "a share above 0 and below 1, to compare epochs and to train on")
    name_datastore(args)
    files = described(args.save, GATE, "adaptret") | {args.save + ".last": ARCHIVE}
    with claimed("--save", args.save, files), claimed("--results-json", args.results_json):
        _train(args)


def _train(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    scores = ScoreCache.open(args.scores)
    ngrams = _ngrams(args, scores) if {"freq", "fert"} & set(args.features) else None
    features = _features(scores, ngrams)
    data = TrainingData(features, np.asarray(scores.lm_log_probs), _knn_log_probs(args, scores), _groups(scores))
    recipe = AdaptRetRecipe(
        tuple(name for name in FEATURES if name in args.features),
        args.hidden,
        args.layers,
        args.dropout,
        args.l1,
        args.lr,
        args.batch_size,
        args.epochs,
        args.seed,
        args.held_out,
    )
    info = {"ngrams": os.path.abspath(_ngram_folder(args)), "k": args.k, "knn_temp": args.knn_temp}
    of = {name: scores.info[name] for name in SOURCE if name in scores.info}
    info |= {"of": of, "ngrams_of": ngrams and ngrams.identity}
    model = train(data, recipe, args.save, info, not args.no_progress_bar)
    curve = model.info["held_out_perplexity"]
    seconds = time.perf_counter() - started
    logger.info("wrote %s: epoch %d, in %.1f s", args.save, model.info["epoch"], seconds)
    if args.results_json:
        figures = {"held_out_perplexity": {str(cutoff): value for cutoff, value in curve.items()}}
        write_results(args.results_json, {**figures, "epoch": model.info["epoch"], "seconds": seconds}, args)


def _features(scores: ScoreCache, ngrams: NgramTable | None) -> dict[str, NDArray[np.float32]]:
    missing = {"lm_max", "lm_entropy", "context"} - set(scores.features)
    if missing:
        raise BadFile(scores.folder, f"no {', '.join(sorted(missing))}", "scores saved with --save-features")
    features = {
        "ctxt": np.asarray(scores.queries, np.float32),
        "lm_max": np.asarray(scores.features["lm_max"])[:, None],
        "lm_ent": np.asarray(scores.features["lm_entropy"])[:, None],
    }
    if ngrams is not None:
        features["freq"], features["fert"] = ngrams.look_up(np.asarray(scores.features["context"]))
    return features


def _ngram_folder(args: argparse.Namespace) -> str:
    return str(args.ngrams or args.save + ".ngrams")


def _ngrams(args: argparse.Namespace, scores: ScoreCache) -> NgramTable:
    """The n-gram counts of the training text; an existing folder is used again if it is of the same text."""
    if args.data is None:
        raise BadFlag("--data", "nothing", "the folder of the training text, or --features without freq and fert")
    dictionary = open_vocabulary(args.data)
    path = os.path.join(args.data, args.ngram_split)
    dataset = data_utils.load_indexed_dataset(path, dictionary, "mmap")
    if dataset is None:
        raise BadFile(path + ".idx", "no such split", "the text that the datastore was made of", "check --ngram-split")
    return count_ngrams(
        dataset.tokens,
        _ngram_folder(args),
        dictionary.eos(),
        scores.info.get("sample_break_mode") == "eos",
        int(args.ngram_memory * (1 << 30)),
        {"data": split_fingerprints(args.data, args.ngram_split)},
        not args.no_progress_bar,
    )


def _knn_log_probs(args: argparse.Namespace, scores: ScoreCache) -> NDArray[np.float32]:
    """(N,): log p_kNN of every token; its searches are saved beside the scores for later runs."""
    defaults = Parser(add_help=False)
    options.add_knn_eval_args(defaults)
    values = {**vars(defaults.parse_args([])), **vars(args), "strategy": "knnlm", "lmbda": 0.25}
    device = torch.device("cuda" if args.knnlm_gpu and torch.cuda.is_available() else "cpu")
    stores = open_stores(argparse.Namespace(**values), scores.dimension, device, scores.vocabulary)
    check_query_model(args.dstore_filename, scores.info, [args.scores] * len(SOURCE))
    identity = search_identity(args, stores.index)
    searches = saved_searches(scores, stores.index, args.k, identity, device, not args.no_progress_bar)
    knnlm = build_knnlm(argparse.Namespace(**values), scores.dimension, device, stores, searches=searches)
    results = (r for group in lockstep_groups(scores.sequences(), 65536) for r in knnlm.score(group))
    return np.concatenate([result.knn_log_probs.numpy() for result in results])


def _groups(scores: ScoreCache) -> NDArray[np.int64]:
    """(N,): the group of each token: its sentence, where samples are sentences; else one of ARTICLES consecutive pieces
    of the text."""
    samples = np.arange(len(scores.lengths))
    if scores.info.get("sample_break_mode") != "eos":
        samples = scores.starts * min(ARTICLES, len(samples)) // max(1, len(scores))
    return np.repeat(samples, scores.lengths)


def cli_main() -> None:
    """Console entry point."""
    cli_entry(lambda: main(options.parse_with_extensions(get_parser())), sys.stderr, goes_on=True)


if __name__ == "__main__":
    cli_main()
