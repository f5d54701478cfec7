"""Opens the index that the flags name: a registered one (`--index exact`, or a user's own), a FAISS file that is
searched on the CPU or a GPU, or a FAISS file whose results are refined by the keys."""

from __future__ import annotations

import argparse

import torch

from fairseq.errors import BadFile
from fairseq.files.sidecar import peek_sidecar, sidecar_path
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.device_search import DeviceIndex
from fairseq.retrieval.index.exact_index import EXACT
from fairseq.retrieval.index.faiss_index import FaissIndex
from fairseq.retrieval.index.interface import Index, open_named
from fairseq.retrieval.index.refined import RefinedIndex

__all__ = ["EXACT", "index_of_flags", "open_index", "refinement"]


def index_of_flags(args: argparse.Namespace, datastore: Datastore, device: torch.device | str = "cpu") -> Index:
    """The index that `--index` or `--indexfile` names, for entries of `datastore`."""
    if args.index is not None:
        return open_named(args.index, args, datastore, device)
    return open_index(args.indexfile, datastore, args.probe, device)


def open_index(
    path: str, datastore: Datastore, probe: int | None = None, device: torch.device | str = "cpu"
) -> Index:
    """The index in the file `path`; a search visits `probe` of its lists."""
    factor = refinement(path)
    if factor is not None:
        keys = datastore.require_keys(f"choosing from what {path} finds")
        return RefinedIndex(path, datastore.size, probe, device, keys, factor)
    kind = FaissIndex if torch.device(device).type == "cpu" else DeviceIndex
    index = kind(path, datastore.size, probe, device)
    if datastore.keys is not None:
        index.check_positions(datastore.keys)
    return index


def refinement(path: str | None) -> float | None:
    """The factor by which a search of the index file `path` should return more than k entries, among which the keys
    decide; it is read from the sidecar. None for an index without refinement."""
    factor = None if path is None else peek_sidecar(path).get("refine")
    if path is None or factor is None:
        return None
    if not isinstance(factor, int | float) or not 1 <= factor <= 100:
        raise BadFile(sidecar_path(path), f"refine {factor!r}", "a number from 1 to 100", "build the index again")
    return float(factor)
