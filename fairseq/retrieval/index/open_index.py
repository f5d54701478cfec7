"""Opening the index that the flags name: a FAISS file, searched on the CPU or a GPU, one whose answers the keys refine,
or the keys themselves (`--index exact`)."""

from __future__ import annotations

import torch

from fairseq.errors import BadFile
from fairseq.files.sidecar import peek_sidecar, sidecar_path
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.device_search import DeviceIndex
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.faiss_index import FaissIndex, Index
from fairseq.retrieval.index.refined import RefinedIndex

EXACT = "exact"


def open_index(
    path: str | None, datastore: Datastore, probe: int | None = None, device: torch.device | str = "cpu"
) -> Index:
    """The index in the file `path`, of whose lists a search visits `probe`; without a file, exact search."""
    if path is None:
        return ExactIndex(datastore.require_keys("--index exact"), device)
    factor = refinement(path)
    if factor is not None:
        keys = datastore.require_keys(f"choosing from what {path} finds")
        return RefinedIndex(path, datastore.size, probe, device, keys, factor)
    kind = FaissIndex if torch.device(device).type == "cpu" else DeviceIndex
    return kind(path, datastore.size, probe, device)


def refinement(path: str | None) -> float | None:
    """How many times k entries an index file's search should return for the keys to choose from, as its sidecar says;
    None for an index that answers by itself."""
    factor = None if path is None else peek_sidecar(path).get("refine")
    if path is None or factor is None:
        return None
    if not isinstance(factor, int | float) or not 1 <= factor <= 100:
        raise BadFile(sidecar_path(path), f"refine {factor!r}", "a number from 1 to 100", "build the index again")
    return float(factor)
