"""Flags of `eval_lm.py` that contradict each other, which are refused, or that have no effect together with others,
which a warning names, because the original accepts them too."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping

from fairseq.errors import BadFlag
from fairseq.retrieval.index.open_index import EXACT
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY

logger = logging.getLogger(__name__)

# Flags that only retrieval reads, and their defaults.
OF_RETRIEVAL = {
    "dstore_filename": None,
    "dstore_weights": False,
    "faiss_metric_type": "l2",
    "index": None,
    "indexfile": None,
    "k": 1024,
    "knn_sim_func": None,
    "knn_temp": 1.0,
    "knnlm_gpu": False,
    "lmbda": 0.0,
    "max_knns": None,
    "members": None,
    "min_knns": 1,
    "move_dstore_to_mem": False,
    "no_load_keys": False,
    "no_pointer": False,
    "probe": 8,
    "strategy": None,
    "target_foss": None,
    "target_foss_subset": None,
}
OF_POINTERS = {"members": None, "min_knns": 1, "max_knns": None}


def flag(name: str) -> str:
    """The flag as it is typed on the command line."""
    return "--" + name.replace("_", "-")


def given(args: argparse.Namespace, defaults: Mapping[str, object]) -> list[str]:
    """The flags among `defaults` whose value differs from the default, as they are typed."""
    return [flag(name) for name, default in defaults.items() if getattr(args, name, default) != default]


def strategy_name(args: argparse.Namespace) -> str:
    """The strategy that the flags choose; BadFlag when they contradict each other."""
    if args.no_pointer and args.strategy is not None and RETRIEVER_REGISTRY[args.strategy].sequential:
        found = f"{args.strategy}, which follows pointers, beside --no-pointer"
        raise BadFlag("--strategy", found, "one of them", "drop --no-pointer, or use --strategy knnlm")
    return args.strategy or ("knnlm" if args.no_pointer else "retomaton")


def check_flags(args: argparse.Namespace) -> None:
    """Warns of flags that have no effect in this kind of run."""
    if not args.knnlm:
        idle = given(args, OF_RETRIEVAL)
        if idle:
            logger.warning("--knnlm is missing, without which nothing reads %s", ", ".join(idle))
    elif args.index == EXACT and args.probe != OF_RETRIEVAL["probe"]:
        logger.warning("--probe is not used with --index exact, which searches all keys")
    if args.dstore_mmap is not None and not args.save_knnlm_dstore:
        logger.warning("--dstore-mmap is only used with --save-knnlm-dstore; --dstore-filename names what is read")
    if args.target_foss is None and args.target_foss_subset is not None and args.knnlm:
        logger.warning("--target-foss-subset is only used with --target-foss")


def check_strategy_flags(args: argparse.Namespace) -> None:
    """Warns of flags that have no effect with the chosen strategy."""
    if not RETRIEVER_REGISTRY[strategy_name(args)].sequential:
        how = "--no-pointer" if args.no_pointer else f"--strategy {args.strategy}"
        for idle in given(args, OF_POINTERS):
            logger.warning("%s is not used with %s", idle, how)
