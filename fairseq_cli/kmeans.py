"""`kmeans.py`: clusters a datastore's keys and writes the members of each cluster."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from fairseq.errors import BadFlag
from fairseq.files.outputs import ARCHIVE, claimed, cluster_files
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout
from fairseq.flag_types import Parser, output_file, output_name, positive_float, positive_int, row_count, small_seed_int
from fairseq.refusals import add_force
from fairseq.retrieval.clusters import Clusters, save_clusters, save_members_pickle
from fairseq.retrieval.clusters.kmeans import ALGORITHMS, KMeansRecipe, cluster_keys
from fairseq.retrieval.datastore import Datastore, keys_path
from fairseq.retrieval.datastore.provenance import datastore_files, datastore_identity
from fairseq_cli.entry import cli_entry

DESCRIPTION = "Clusters a datastore's keys and writes the members of each cluster."
EXAMPLE = "%(prog)s --dstore dstore --num-clusters 10000 --sample 1000000"
logger = logging.getLogger("fairseq_cli.kmeans")


def get_parser() -> argparse.ArgumentParser:
    """The original's flags, and further ones."""
    parser = Parser(description=DESCRIPTION, layout=Layout({}, example=EXAMPLE))
    add = parser.add_argument_group("Datastore").add_argument
    add("--dstore", required=True, metavar="PREFIX", help="prefix of the datastore's files")
    add("--dstore-size", type=row_count, metavar="N", help="entries (default: known from the files)")
    add("--dim", "--dimension", type=positive_int, metavar="D",
        help="width of the keys (default: as sidecar or bytes say)")
    add = parser.add_argument_group("Clusters").add_argument
    add("--num-clusters", type=positive_int, required=True, help="number of clusters; about entries / 100")
    add("--sample", type=positive_int, required=True, help="most keys from which centroids are computed")
    add("--iterations", type=positive_int, default=20, help="iterations of k-means")
    add("--algorithm", choices=ALGORITHMS, default="lloyd", help="lloyd as published, or two-level: ten times faster")
    add("--seed", type=small_seed_int, default=1, help="seed of sample and k-means")
    add = parser.add_argument_group("Memory").add_argument
    add("--batch-size", type=positive_int, default=500000, help="keys assigned at a time")
    add("--memory-gb", type=positive_float, metavar="GB", help="most memory for sample and batches (default: no bound)")
    add = parser.add_argument_group("Output").add_argument
    add(
        "--save", nargs="?", type=output_name, metavar="PREFIX",
        help="prefix of the files to write (default: beside the datastore)",
    )
    add("--no-progress-bar", action="store_true", help="no progress bar")
    add("--results-json", type=output_file, metavar="FILE", help="write counts, times and versions here")
    add_force(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Clusters and writes `PREFIX_s{sample}_k{clusters}_members.pkl` and the folder `..._clusters`."""
    save = args.save or os.path.join(os.path.dirname(args.dstore), "kmeans")
    prefix = f"{save}_s{args.sample}_k{args.num_clusters}"
    files = cluster_files(prefix + "_clusters", prefix + "_members.pkl") | {prefix + ".kmeans.tmp": ARCHIVE}
    with claimed("--save", prefix, files), claimed("--results-json", args.results_json):
        _cluster(args, prefix)


def _cluster(args: argparse.Namespace, prefix: str) -> None:
    started = time.perf_counter()
    datastore = Datastore.open(args.dstore, args.dstore_size, args.dim)
    filled = datastore.without_empty_rows("the clusters")
    keys = filled.require_keys("clustering")
    if args.num_clusters > filled.size:
        raise BadFlag("--num-clusters", args.num_clusters, f"at most the datastore's {filled.size} entries")
    recipe = KMeansRecipe(args.num_clusters, args.sample, args.iterations, args.seed, args.algorithm)
    described = datastore_identity(datastore)
    shown = not args.no_progress_bar
    where = (prefix, described, keys_path(args.dstore))
    assignment, state = cluster_keys(keys, recipe, args.batch_size, shown, args.memory_gb, *where)
    clusters = Clusters.from_assignment(assignment, size=datastore.size)
    info = {"datastore": datastore.info, "algorithm": args.algorithm, "iterations": args.iterations, "seed": args.seed}
    info["datastore_files"] = datastore_files(datastore)
    save_clusters(prefix + "_clusters", clusters, info)
    save_members_pickle(prefix + "_members.pkl", clusters, info)
    state.clear()
    seconds = time.perf_counter() - started
    logger.info("wrote %s_members.pkl and %s_clusters: %d clusters in %.1f s", prefix, prefix, clusters.count, seconds)
    if args.results_json:
        figures = {"clusters": clusters.count, "entries": filled.size, "seconds": seconds}
        write_results(args.results_json, figures, args)


def cli_main() -> None:
    """Console entry point."""
    cli_entry(lambda: main(get_parser().parse_args()), sys.stderr, goes_on=True)


if __name__ == "__main__":
    cli_main()
