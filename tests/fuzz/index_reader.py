"""The FAISS index reader under fuzzing: several kinds of index in turn, read, searched, and asked for distances."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import torch

from fairseq.retrieval.index import FaissIndex
from tests.fuzz.readers import ENTRIES, WIDTH, Reader, small_keys


def _indexes() -> dict[str, faiss.Index]:
    keys = small_keys()
    faiss.cvar.indexPQ_stats  # noqa: B018  (loads the library's globals)
    ivfpq = faiss.IndexIVFPQ(faiss.IndexFlatL2(WIDTH), WIDTH, 4, 2, 4)
    eight = faiss.IndexIVFPQ(faiss.IndexFlatL2(WIDTH), WIDTH, 2, 2, 8)
    many = np.random.default_rng(0).standard_normal((300, WIDTH)).astype(np.float32)
    transform = faiss.IndexPreTransform(faiss.PCAMatrix(WIDTH, 2), faiss.IndexIVFFlat(faiss.IndexFlatL2(2), 2, 3))
    transform.train(many)
    ivfpq.train(many)
    eight.train(many)
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(WIDTH))
    mapped.add_with_ids(keys, np.arange(ENTRIES)[::-1].copy())
    graph = faiss.IndexHNSWFlat(WIDTH, 4)
    over_graph = faiss.IndexIVFFlat(faiss.IndexHNSWFlat(WIDTH, 4), WIDTH, 8)
    scalar = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(WIDTH), WIDTH, 3, faiss.ScalarQuantizer.QT_8bit)
    fast = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(WIDTH), WIDTH, 3, 2, 4)
    for index in (over_graph, scalar, fast):
        index.train(many)
    for index in (transform, ivfpq, eight, graph, over_graph, scalar, fast):
        index.add(keys)
    indexes = {"ivfpq": ivfpq, "eight": eight, "transform": transform, "mapped": mapped, "graph": graph}
    return {**indexes, "over graph": over_graph, "scalar": scalar, "fast": fast}


def _prepare(folder: Path) -> list[Path]:
    paths = []
    for name, index in _indexes().items():
        faiss.write_index(index, str(folder / f"{name}.index"))
        paths.append(folder / f"{name}.index")
    return paths


def _read(folder: Path) -> object:
    queries = torch.from_numpy(small_keys()[:3])
    for path in sorted(folder.glob("*.index")):
        index = FaissIndex(str(path), ENTRIES, probe=3)
        if index.dimension != WIDTH:
            continue  # the caller refuses it
        index.search(queries, 5)
        if path.stem != "fast":  # of whose entries there are no distances
            index.distances(queries, torch.tensor([0, 1, 2]), torch.tensor([0, 9, ENTRIES - 1]))
        index.describe()
    return None


READER = Reader(_prepare, _read)
