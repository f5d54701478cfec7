"""`fairseq-greedy-merge`: merges neighbouring entries of a datastore that have the same value (He et al., 2021)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

import numpy as np

from fairseq.errors import BadFlag
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.files.outputs import ARRAY, PROGRESS, RAW, check_files, claimed, cluster_files, described, stored_files
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout
from fairseq.flag_types import Parser, output_file, output_name, positive_int, row_count, seed_int
from fairseq.refusals import add_force
from fairseq.retrieval.clusters import Clusters, save_clusters, save_members_pickle
from fairseq.retrieval.clusters.greedy_merge import dump_neighbours, merge, write_merged
from fairseq.retrieval.datastore import Datastore, weights_path
from fairseq.retrieval.datastore.provenance import check_belongs, datastore_files, datastore_identity
from fairseq.retrieval.index import FaissIndex
from fairseq_cli.entry import cli_entry

DESCRIPTION = """Merges neighbouring entries of a datastore that have the same value (He et al., 2021), into a smaller
datastore with weights, into clusters for --members, or both. The neighbours of all entries are searched first and kept
beside the output, so that other --merge values are quick."""
EXAMPLE = "%(prog)s --dstore dstore --indexfile index --merge 9"
logger = logging.getLogger("fairseq_cli.greedy_merge")

OUTPUTS = ("datastore", "members")


def get_parser() -> argparse.ArgumentParser:
    """Flags; defaults are those of the paper's script."""
    parser = Parser(prog="fairseq-greedy-merge", description=DESCRIPTION, layout=Layout({}, example=EXAMPLE))
    add = parser.add_argument_group("Datastore and index").add_argument
    add("--dstore", required=True, metavar="PREFIX", help="prefix of the datastore's files")
    add("--dstore-size", type=row_count, metavar="N", help="entries (default: known from the files)")
    add("--dim", "--dimension", type=positive_int, metavar="D",
        help="width of the keys (default: as sidecar or bytes say)")
    add("--indexfile", required=True, metavar="FILE", help="index of the datastore")
    add("--probe", type=positive_int, default=32, help="lists of the index that a search visits")
    add = parser.add_argument_group("Merging").add_argument
    add("--k", type=positive_int, default=30, help="neighbours to keep of every entry")
    add("--merge", type=positive_int, default=9, metavar="K", help="neighbours that an entry may absorb; below --k")
    add("--seed", type=seed_int, default=22, help="seed of the order in which entries absorb")
    add = parser.add_argument_group("Output").add_argument
    add("--output", nargs="+", choices=OUTPUTS, default=list(OUTPUTS), help="what to write")
    add(
        "--save", type=output_name, metavar="PREFIX",
        help="prefix of the files to write (default: dstore, beside the datastore)",
    )
    add("--no-progress-bar", action="store_true", help="no progress bar")
    add("--results-json", type=output_file, metavar="FILE", help="write counts, times and versions here")
    add_force(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes `PREFIX_merge{K}_members.pkl` and `..._clusters`, and `PREFIX_merge{K}_size{n}_embed{D}_fp16_keys.npy` and
    the like."""
    if args.merge >= args.k:
        raise BadFlag("--merge", args.merge, f"less than --k {args.k}, since an entry is its own neighbour")
    save = args.save or os.path.join(os.path.dirname(args.dstore), "dstore")
    files = cluster_files(f"{save}_merge{args.merge}_clusters", f"{save}_merge{args.merge}_members.pkl")
    with claimed("--save", save, files), claimed("--results-json", args.results_json):
        _merge(args, save)


def _merge(args: argparse.Namespace, save: str) -> None:
    started = time.perf_counter()
    datastore = Datastore.open(args.dstore, args.dstore_size, args.dim)
    index = FaissIndex(args.indexfile, datastore.size, args.probe)
    check_belongs("--indexfile", args.indexfile, datastore)
    identity = {"index": quick_fingerprint(args.indexfile), "probe": args.probe}
    identity["datastore"] = datastore_identity(datastore)
    path = f"{save}_size{datastore.size}_k{args.k}_int32.npy"
    check_files("--save", described(path, ARRAY, "neighbours") | {path + ".progress.json": PROGRESS})
    filled = datastore.without_empty_rows("what is merged")
    filled.check_words(datastore.info.get("vocabulary"))
    neighbours = dump_neighbours(filled, index, args.k, path, identity, not args.no_progress_bar)
    result = merge(neighbours, filled.values, args.merge, args.seed)
    kept, largest = len(result.kept), int(result.weights.max(initial=0))
    logger.info("%d of %d entries remain (%.1f%%)", kept, filled.size, 100 * kept / max(1, filled.size))
    info = {"algorithm": "greedy", "merge": args.merge, "seed": args.seed}
    if "members" in args.output:
        clusters = Clusters.from_assignment(result.assignment(), size=datastore.size)
        origin = {**info, "datastore": datastore.info, "datastore_files": datastore_files(datastore)}
        save_clusters(f"{save}_merge{args.merge}_clusters", clusters, origin)
        save_members_pickle(f"{save}_merge{args.merge}_members.pkl", clusters, origin)
        logger.info("wrote %s_merge%d_members.pkl and the folder of the same as _clusters", save, args.merge)
    if "datastore" in args.output:
        precision = "fp16" if datastore.require_keys("merging").dtype == np.float16 else "fp32"
        prefix = f"{save}_merge{args.merge}_size{kept}_embed{datastore.dimension}_{precision}"
        check_files("--save", stored_files(prefix) | {weights_path(prefix): RAW})
        write_merged(filled, result, prefix, info)
        logger.info("wrote %s_keys.npy, _vals.npy and _weights.npy; use it with --dstore-weights", prefix)
    if args.results_json:
        figures = {"entries": filled.size, "kept": kept, "largest_weight": largest}
        write_results(args.results_json, {**figures, "seconds": time.perf_counter() - started}, args)


def cli_main() -> None:
    """Console entry point."""
    cli_entry(lambda: main(get_parser().parse_args()), sys.stderr, goes_on=True)


if __name__ == "__main__":
    cli_main()
