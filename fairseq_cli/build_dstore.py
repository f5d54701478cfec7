"""`build_dstore.py`: builds the FAISS index of a datastore."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Any

from fairseq.errors import BadFlag
from fairseq.files.outputs import claimed, index_files
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout
from fairseq.flag_types import Parser, natural_int, output_file, output_name, positive_int, row_count, seed_int
from fairseq.refusals import add_force
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.build_index import CODE_SIZE, IndexBuilder, IndexRecipe
from fairseq.retrieval.index.open_index import open_index
from fairseq.retrieval.index.recall import exact_neighbours, noisy_keys, recall_of
from fairseq_cli.entry import cli_entry

DESCRIPTION = "Builds the FAISS index of a datastore. Flags of several words are taken with dashes or underscores."
EXAMPLE = "%(prog)s --dstore-mmap dstore --faiss-index index --ncentroids 4096 --code-size 64"
logger = logging.getLogger("fairseq_cli.build_dstore")

RECALL_K, PAPER_PROBE = 1024, 32


def get_parser() -> argparse.ArgumentParser:
    """The original's flags, and further ones."""
    parser = Parser(description=DESCRIPTION, layout=Layout({}, accepted="--starting-point", example=EXAMPLE))
    add = parser.add_argument_group("Datastore").add_argument
    add("--dstore_mmap", "--dstore-mmap", required=True, metavar="PREFIX", help="prefix of the datastore's files")
    add("--dstore_size", "--dstore-size", type=row_count, metavar="N",
        help="rows of the files (default: known from them)")
    add("--dimension", type=positive_int, metavar="D", help="width of the keys (default: as sidecar or bytes say)")
    add("--dstore_fp16", "--dstore-fp16", action="store_true", help="the keys are float16")
    add(
        "--actual_dstore_size",
        "--actual-dstore-size",
        type=row_count,
        metavar="N",
        help="rows that hold entries (default: all before an all-zero tail)",
    )
    add = parser.add_argument_group("Index").add_argument
    add("--ncentroids", type=positive_int, default=4096, help="inverted lists")
    add("--code_size", "--code-size", type=positive_int, default=CODE_SIZE, help="bytes of a quantised vector")
    add("--probe", type=positive_int, default=8, help="lists visited by a search, stored in the file")
    add("--pca", type=natural_int, default=0, metavar="D", help="reduce keys to D dimensions first (default: do not)")
    add(
        "--preset",
        choices=("published", "fast"),
        default="published",
        help="fast: codes of as many bytes, scanned faster and refined by the keys; searching then needs the keys",
    )
    add("--seed", type=seed_int, default=1, help="seed of the training sample")
    add = parser.add_argument_group("Memory").add_argument
    add("--num_keys_to_add_at_a_time", "--num-keys-to-add-at-a-time", type=positive_int, default=1000000, metavar="N",
        help="keys read and added at a time; bounds the memory")
    add = parser.add_argument_group("Output").add_argument
    add("--faiss_index", "--faiss-index", required=True, type=output_name, metavar="FILE", help="index to write")
    add(
        "--recall-queries",
        type=natural_int,
        default=64,
        metavar="N",
        help="at the end, how much of an exact search the index finds for N queries; reads all keys again "
        "(default: 64; 0: do not)",
    )
    add("--no-progress-bar", action="store_true", help="no progress bar")
    add("--results-json", type=output_file, metavar="FILE", help="write sizes, times and versions here")
    add_force(parser)
    accepted = "a build continues an interrupted one by itself"
    parser.add_argument("--starting_point", "--starting-point", type=natural_int, default=0, help=accepted)
    return parser


def main(args: argparse.Namespace) -> None:
    """Builds the index."""
    files = index_files(args.faiss_index)
    with claimed("--faiss_index", args.faiss_index, files), claimed("--results-json", args.results_json):
        _build(args)


def _build(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    datastore = Datastore.open(args.dstore_mmap, args.dstore_size, args.dimension, args.dstore_fp16 or None)
    size = args.actual_dstore_size
    if size is None:
        size = datastore.without_empty_rows("the index (--actual_dstore_size would keep them)").size
    elif size > datastore.size:
        raise BadFlag("--actual_dstore_size", size, f"at most the datastore's {datastore.size} rows")
    if args.starting_point:
        logger.warning("--starting_point %d is ignored: an interrupted build continues by itself", args.starting_point)
    recipe = IndexRecipe(args.ncentroids, args.code_size, args.probe, args.seed, args.pca, args.preset == "fast")
    builder = IndexBuilder(datastore, args.faiss_index, recipe, size, args.num_keys_to_add_at_a_time)
    index = builder.build(show_progress=not args.no_progress_bar)
    results: dict[str, Any] = {"entries": int(index.ntotal), "seconds": time.perf_counter() - started}
    if args.recall_queries:
        results["recall"] = _recall(args, datastore, size)
    if args.results_json:
        write_results(args.results_json, results, args)


def _recall(args: argparse.Namespace, datastore: Datastore, size: int) -> list[dict[str, Any]]:
    """Logs and returns the recall of the index against exact search of the first `size` keys, with its stored probe and
    with the paper's."""
    keys = datastore.require_keys("measuring recall")[:size]
    queries, k = noisy_keys(keys, args.recall_queries), min(RECALL_K, size)
    exact = exact_neighbours(keys, queries, k)
    figures = []
    for probe in sorted({min(probe, args.ncentroids) for probe in (args.probe, PAPER_PROBE)}):
        recall = recall_of(open_index(args.faiss_index, datastore, probe).search(queries, k)[1], exact)
        logger.info("with --probe %d: %s", probe, recall)
        figures.append({"probe": probe, **recall.figures()})
    return figures


def cli_main() -> None:
    """Console entry point."""
    cli_entry(lambda: main(get_parser().parse_args()), sys.stderr, goes_on=True)


if __name__ == "__main__":
    cli_main()
