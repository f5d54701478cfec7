"""Opens the files of an evaluation, once for any number of settings: datastore, index, similarity and clusters, as
eval_lm's flags name them. Checks that they belong together."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass, field

import torch

from fairseq.errors import BadFlag, MissingFile
from fairseq.retrieval.clusters import KIND as CLUSTERS_KIND
from fairseq.retrieval.clusters import Clusters, load_clusters
from fairseq.retrieval.datastore import Datastore, keys_path, read_weights
from fairseq.retrieval.datastore.provenance import check_belongs
from fairseq.retrieval.index import Index
from fairseq.retrieval.index.faiss_index import check_dimension
from fairseq.retrieval.index.interface import index_needs_keys, named_index
from fairseq.retrieval.index.open_index import index_of_flags, refinement
from fairseq.retrieval.similarity import Similarity, WeightedSimilarity, build_similarity, needs_keys

logger = logging.getLogger(__name__)


@dataclass
class Stores:
    """The open files of any number of KNNLMs: datastore, index, similarity, and clusters by path."""

    datastore: Datastore
    index: Index
    similarity: Similarity
    device: torch.device | str = "cpu"
    _clusters: dict[str, Clusters] = field(default_factory=dict)

    def clusters(self, path: str) -> Clusters:
        """The clusters of a members file, read at first use."""
        if path not in self._clusters:
            self._clusters[path] = load_clusters(path, self.datastore.size)
            described = os.path.join(path, CLUSTERS_KIND) if os.path.isdir(path) else path
            check_belongs("--members", described, self.datastore)
            clusters = self._clusters[path]
            logger.info("clusters %s: %d of %d entries", path, clusters.count, len(clusters.members))
        return self._clusters[path]


def open_stores(
    args: argparse.Namespace, dimension: int, device: torch.device | str = "cpu", vocabulary: int | None = None
) -> Stores:
    """Opens the datastore and index that eval_lm's flags name, for queries of width `dimension`; values must be words
    of a dictionary of `vocabulary` words, if that is given."""
    require_stores(args)
    function = args.knn_sim_func
    load_keys = not args.no_load_keys and (needs_keys(function, args.faiss_metric_type) or _index_needs_keys(args))
    try:
        datastore = Datastore.open(
            args.dstore_filename,
            args.dstore_size,
            dimension,
            args.dstore_fp16 or None,
            load_keys=load_keys,
            in_memory=args.move_dstore_to_mem,
        )
    except MissingFile as error:
        if error.file != keys_path(args.dstore_filename):
            raise
        raise MissingFile(error.file, _without_keys(args)) from None
    if vocabulary is not None:
        datastore.check_words(vocabulary)
    logger.info("datastore %s: %d entries of dimension %d", args.dstore_filename, datastore.size, dimension)
    if args.knnlm_gpu and torch.device(device).type == "cpu":
        logger.warning("--knnlm-gpu: no GPU is used in this run, so the index is searched on the CPU")
    index = index_of_flags(args, datastore, device)
    check_dimension(index.dimension, dimension, args.indexfile or f"--index {args.index}")
    if args.indexfile is not None:
        check_belongs("--indexfile", args.indexfile, datastore)
    logger.info("index %s: %s", args.index or args.indexfile, index.describe())
    if getattr(args, "index_recall", None) is not None:
        datastore.require_keys("--index-recall")
        if index.inner_product:
            raise BadFlag("--index-recall", "an inner-product index", "one of L2 distances", "drop the flag")
    similarity = build_similarity(function, args.faiss_metric_type, datastore, index)
    if getattr(args, "dstore_weights", False):
        similarity = WeightedSimilarity(similarity, torch.from_numpy(read_weights(datastore)).to(device))
    return Stores(datastore, index, similarity, device)


def require_stores(args: argparse.Namespace) -> None:
    """BadFlag unless the flags name a datastore and an index, and do not contradict each other."""
    if args.dstore_filename is None:
        raise BadFlag("--dstore-filename", "nothing", "the prefix of the datastore to use with --knnlm")
    takes_file = args.index is None or getattr(named_index(args.index), "takes_file", False)
    if args.indexfile is None and takes_file:
        expected = "the index of the datastore to use with --knnlm"
        raise BadFlag("--indexfile", "nothing", expected, "give it, or --index exact")
    if args.indexfile is not None and not takes_file:
        raise BadFlag("--index", f"{args.index} beside --indexfile", "one of them", "drop the other")
    if args.probe < 1:
        raise BadFlag("--probe", args.probe, "at least 1")


def _index_needs_keys(args: argparse.Namespace) -> bool:
    recall = getattr(args, "index_recall", None) is not None
    return recall or index_needs_keys(args.index) or _refinement(args) is not None


def _refinement(args: argparse.Namespace) -> float | None:
    return refinement(args.indexfile) if args.index is None else None


def _without_keys(args: argparse.Namespace) -> str:
    """The remedy in the error message when the file of keys is missing."""
    if _refinement(args) is not None:
        what = f"{args.indexfile} was built with --preset fast and needs them"
        return f"{what}: copy them here, or use an index built without that flag"
    if index_needs_keys(args.index):
        return f"--index {args.index} compares with them: copy them here"
    copy = "check --dstore-filename"
    if needs_keys(args.knn_sim_func, args.faiss_metric_type):
        return f"{copy}, or do without the keys: --knn-sim-func do_not_recomp_l2"
    return f"{copy}, or drop --index-recall, which needs the keys"
