"""The readers of retrieval's artefacts under fuzzing: each as this package writes it, with its sidecar or seal. A read
returns an answer in bytes, which a damaged copy must leave as it is, or be refused: artefacts that are made again, and
unfinished jobs that go on, included."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.evaluation.results_files import digest_of_points
from fairseq.evaluation.sweep import SettingResult
from fairseq.files.array_stream import ArrayStream, RowDigest, progress
from fairseq.files.atomic_io import temporary_path, write_json
from fairseq.files.progress import write_progress
from fairseq.retrieval.clusters.greedy_merge import dump_neighbours, merge
from fairseq.retrieval.clusters.kmeans import KMeansRecipe, cluster_keys
from fairseq.retrieval.clusters.members import Clusters, load_clusters, save_clusters, save_members_pickle
from fairseq.retrieval.datastore.provenance import datastore_files
from fairseq.retrieval.datastore.reader import Datastore, read_weights
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.index.build_index import IndexBuilder, IndexRecipe
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.index.faiss_index import FaissIndex
from fairseq.retrieval.retrievers import adaptret_network
from fairseq.retrieval.retrievers.adaptret_network import AdaptRet, AdaptRetNetwork, AdaptRetRecipe, TrainingData
from fairseq.retrieval.retrievers.ngrams import NgramTable, count_ngrams
from fairseq.retrieval.saved.scores import ScoreCache, ScoreWriter
from fairseq.retrieval.saved.searches import saved_searches
from fairseq.scored_sequences import ScoredSequence
from fairseq_cli import sweep

ENTRIES, WIDTH = 300, 4
VOCABULARY = 50
IDENTITY = {"scores": {"tokens": 20}, "lmbda": None}
GATE = AdaptRetRecipe(("ctxt", "lm_max", "fert"), hidden=4, layers=2, epochs=2, dropout=0.0)
RECIPE = KMeansRecipe(5, 40, 2)


class Stopped(BaseException):
    """What ends a job before it is done."""


def stored_keys(seed: int = 3) -> np.ndarray:
    """(300, 4) float32 keys."""
    return np.random.default_rng(seed).standard_normal((ENTRIES, WIDTH)).astype(np.float32)


def stored_values() -> np.ndarray:
    """(300,) words."""
    return np.random.default_rng(4).integers(4, VOCABULARY, ENTRIES)


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def _bytes(*arrays: Any) -> bytes:
    return b"|".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def write_datastore(folder: Path, seed: int = 3, weights: bool = False) -> Datastore:
    """A whole datastore in `folder`."""
    writer = DatastoreWriter(str(folder / "d"), ENTRIES, WIDTH, True, {"vocabulary": VOCABULARY})
    writer.append(stored_keys(seed), stored_values())
    if weights:
        (np.arange(ENTRIES) % 7 + 1).astype("<i8").tofile(temporary_path(folder / "d_weights.npy"))
    staged = {"weights": str(folder / "d_weights.npy")} if weights else {}
    writer.finish({"vocabulary": VOCABULARY, "weights": ["abc"]}, staged)
    return Datastore.open(str(folder / "d"))


def prepare_datastore(folder: Path) -> list[Path]:
    write_datastore(folder, weights=True)
    return files_in(folder)


def read_datastore(folder: Path) -> bytes:
    datastore = Datastore.open(str(folder / "d"))
    return _bytes(datastore.require_keys("reading"), datastore.values, read_weights(datastore))


def prepare_half_datastore(folder: Path) -> list[Path]:
    writer = DatastoreWriter(str(folder / "d"), ENTRIES, WIDTH, True, {"vocabulary": VOCABULARY})
    writer.append(stored_keys()[:200], stored_values()[:200])
    writer.close()
    return files_in(folder)


def read_half_datastore(folder: Path) -> bytes:
    writer = DatastoreWriter(str(folder / "d"), ENTRIES, WIDTH, True, {"vocabulary": VOCABULARY})
    writer.append(stored_keys()[writer.written :], stored_values()[writer.written :])
    writer.finish({"vocabulary": VOCABULARY})
    return (folder / "d_keys.npy").read_bytes() + (folder / "d_vals.npy").read_bytes()


def builder(folder: Path) -> IndexBuilder:
    """Of an index of the datastore in `folder`."""
    datastore = Datastore.open(str(folder / "d"), ENTRIES, WIDTH, True)
    return IndexBuilder(datastore, str(folder / "i.index"), IndexRecipe(4, 2, 2, 1), ENTRIES, 64)


def prepare_index(folder: Path) -> list[Path]:
    write_datastore(folder)
    builder(folder).build(show_progress=False)
    return [folder / "i.index", folder / "i.index.json"]


def read_index(folder: Path) -> bytes:
    index = FaissIndex(str(folder / "i.index"), ENTRIES, 4)
    queries = torch.from_numpy(stored_keys()[:3])
    distances = index.distances(queries, torch.tensor([0, 1, 2]), torch.tensor([0, 9, ENTRIES - 1]))
    return _bytes(*(part.numpy() for part in (*index.search(queries, 5), distances)))


def prepare_trained(folder: Path) -> list[Path]:
    write_datastore(folder)
    builder(folder).build(show_progress=False)
    for name in ("i.index", "i.index.json"):
        (folder / name).unlink()
    return [folder / "i.index.trained", folder / "i.index.trained.json"]


def build_half(folder: Path) -> None:
    """Encodes all keys, and ends before they are in an index."""
    unfinished = builder(folder)

    def stop(index: Any) -> None:
        raise Stopped

    unfinished._fill = stop  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        unfinished.build(show_progress=False)


def prepare_half_index(folder: Path) -> list[Path]:
    write_datastore(folder)
    build_half(folder)
    return [temporary_path(folder / "i.index.codes"), folder / "i.index.progress.json"]


def read_built(folder: Path) -> bytes:
    builder(folder).build(show_progress=False)
    return (folder / "i.index").read_bytes()


def prepare_members(folder: Path) -> list[Path]:
    clusters = Clusters.from_assignment(np.arange(ENTRIES) % 7)
    origin = {"datastore_files": datastore_files(write_datastore(folder))}
    save_members_pickle(str(folder / "m.pkl"), clusters, origin)
    return [folder / "m.pkl", folder / "m.pkl.json"]


def prepare_arrays(folder: Path) -> list[Path]:
    clusters = Clusters.from_assignment(np.arange(ENTRIES) % 7)
    save_clusters(str(folder / "c"), clusters, {"datastore_files": datastore_files(write_datastore(folder))})
    return files_in(folder / "c")


def read_clusters(name: str, folder: Path) -> bytes:
    clusters = load_clusters(str(folder / name), ENTRIES)
    return _bytes(*(array.astype(np.int64) for array in (clusters.indptr, clusters.members, clusters.cluster_of)))


def prepare_kmeans(folder: Path) -> list[Path]:
    _, state = cluster_keys(stored_keys(), RECIPE, 64, False, prefix=str(folder / "k"))
    assert state.path is not None
    assert state.assignment_path is not None
    path = temporary_path(state.assignment_path)
    path.write_bytes(path.read_bytes()[: 3 * (64 * 4 + 16)])
    return files_in(folder)


def read_kmeans(folder: Path) -> bytes:
    return cluster_keys(stored_keys(), RECIPE, 64, False, prefix=str(folder / "k"))[0].tobytes()


def write_scores(folder: Path, **info: Any) -> None:
    """Three samples, with features."""
    generator = torch.Generator().manual_seed(0)
    writer = ScoreWriter(str(folder / "s"))
    for sample, count in ((5, 7), (2, 9), (9, 4)):
        features = {
            "lm_max": torch.rand(count, generator=generator),
            "lm_entropy": torch.rand(count, generator=generator),
            "context": torch.randint(0, VOCABULARY, (count, 4), generator=generator),
        }
        queries, targets = torch.randn(count, WIDTH, generator=generator), torch.arange(4, 4 + count)
        probabilities = -torch.rand(count, generator=generator)
        writer.add(ScoredSequence(sample, queries, targets, probabilities, features), np.arange(count) % 2 == 0)
    writer.finish({"vocabulary": VOCABULARY, "weights": ["abc"], "remove_bpe": None, **info})


def prepare_scores(folder: Path) -> list[Path]:
    write_scores(folder)
    return files_in(folder / "s")


def read_scores(folder: Path) -> bytes:
    scores = ScoreCache.open(str(folder / "s"))
    parts = [np.array([scores.words]), scores.sample_ids]
    for sequence in scores.sequences():
        parts += [part.numpy() for part in (sequence.queries, sequence.targets, sequence.lm_log_probs)]
        parts += [part.numpy() for part in sequence.features.values()]
    return _bytes(*parts)


def search_all(folder: Path, seed: int = 3, k: int = 5, identity: str = "exact") -> Any:
    """The saved searches of the scores in `folder`."""
    scores, index = ScoreCache.open(str(folder / "s")), ExactIndex(stored_keys(seed))
    return saved_searches(scores, index, k, {"index": identity}, show_progress=False)


def prepare_searches(folder: Path) -> list[Path]:
    write_scores(folder)
    search_all(folder)
    return [path for path in files_in(folder / "s") if path.parent.name.startswith("searches-")]


def read_searches(folder: Path) -> bytes:
    searches = search_all(folder)
    return _bytes(searches.ids.astype(np.int64)[:, :5], searches.distances[:, :5])


def setting_result() -> SettingResult:
    """The result for 20 tokens at two temperatures."""
    generator = np.random.default_rng(7)
    by_temperature = -generator.random((2, 20)).astype(np.float32)
    return SettingResult([1.0, 3.0], by_temperature, generator.random(20) < 0.5, by_temperature[0], 12.5, 0.25)


def prepare_result(folder: Path) -> list[Path]:
    setting_result().save(str(folder / "w.npz"), IDENTITY)
    return [folder / "w.npz"]


def read_result(folder: Path) -> bytes:
    known = SettingResult.load(str(folder / "w.npz"), IDENTITY, 20) or setting_result()
    return _bytes(*vars(known).values())


def prepare_points(folder: Path) -> list[Path]:
    points = [{"strategy": "knnlm", "perplexity": 12.5 + number, "k": number} for number in range(4)]
    digest = digest_of_points(points, points[:1])
    fields = {"points": points, "earlier_points": points[:1], "points_digest": digest}
    write_json(folder / "p.json", {"identity": IDENTITY, **fields})
    return [folder / "p.json"]


def read_points(folder: Path) -> bytes:
    return json.dumps(sweep._kept_points(str(folder / "p.json"), IDENTITY)).encode()


def gate(**info: Any) -> AdaptRet:
    """An untrained network."""
    torch.manual_seed(0)
    thresholds = {cutoff: -cutoff / 100 for cutoff in adaptret_network.CUTOFFS}
    return AdaptRet(AdaptRetNetwork(GATE, WIDTH), GATE, WIDTH, thresholds, {"k": 5, **info})


def prepare_gate(folder: Path) -> list[Path]:
    gate(of={"weights": ["abc"], "vocabulary": VOCABULARY}).save(str(folder / "g.pt"))
    return files_in(folder)


def read_gate(folder: Path) -> bytes:
    model = AdaptRet.load(str(folder / "g.pt"))
    features = {"ctxt": torch.ones(2, WIDTH), "lm_max": torch.ones(2, 1), "fert": torch.ones(2, 4)}
    said = json.dumps([model.info, sorted(model.thresholds.items())]).encode()
    return _bytes(model.weights(features).numpy()) + said


def gate_data(seed: int = 0) -> TrainingData:
    """80 tokens."""
    generator = np.random.default_rng(seed)
    widths = {"ctxt": WIDTH, "lm_max": 1, "fert": 4}
    features = {name: generator.random((80, width), np.float32) for name, width in widths.items()}
    lm, knn = (-generator.random(80, np.float32) for _ in range(2))
    return TrainingData(features, lm, knn, np.arange(80) // 8)


def prepare_gate_state(folder: Path) -> list[Path]:
    training = adaptret_network._Training(gate_data(), GATE, str(folder / "g.pt"), {})
    validate = training._validate

    def stop(loss: float) -> None:
        validate(loss)
        raise Stopped

    training._validate = stop  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        training.run(progress=False)
    return [folder / "g.pt.last"]


def read_gate_state(folder: Path) -> bytes:
    model = adaptret_network.train(gate_data(), GATE, str(folder / "g.pt"), {}, progress=False)
    return _bytes(*(tensor.numpy() for tensor in model.network.state_dict().values()))


def text(seed: int = 5) -> np.ndarray:
    """300 words."""
    return np.random.default_rng(seed).integers(2, 12, 300)


def prepare_ngrams(folder: Path) -> list[Path]:
    count_ngrams(text(), str(folder / "n"), 2, info={"data": {"dict.txt": "abc"}}, show_progress=False)
    return files_in(folder / "n")


def read_ngrams(folder: Path) -> bytes:
    table = NgramTable.open(str(folder / "n"))
    counts = table.look_up(np.lib.stride_tricks.sliding_window_view(text(), 4))
    return _bytes(*counts) + json.dumps(table.identity).encode()


def prepare_neighbours(folder: Path) -> list[Path]:
    write_datastore(folder)
    read_neighbours(folder)
    return [folder / "n.npy", folder / "n.npy.json"]


def read_neighbours(folder: Path, seed: int = 3) -> bytes:
    datastore, index = Datastore.open(str(folder / "d"), ENTRIES, WIDTH, True), ExactIndex(stored_keys(seed))
    neighbours = dump_neighbours(datastore, index, 6, str(folder / "n.npy"), {"probe": seed}, show_progress=False)
    result = merge(neighbours, datastore.values, 5)
    return _bytes(result.weights, result.absorber)


def prepare_half_neighbours(folder: Path) -> list[Path]:
    """The first 100 rows are there, and the progress file that says so."""
    prepare_neighbours(folder)
    info = json.loads((folder / "n.npy.json").read_text())
    whole = np.load(folder / "n.npy")
    for name in ("n.npy", "n.npy.json"):
        (folder / name).unlink()
    stream = ArrayStream(str(folder / "n.npy"), "<i4", (6,))
    stream.append(whole[:100])
    stream.flush()
    described = {name: info[name] for name in ("k", "entries", "identity")}
    write_progress(str(folder / "n.npy.progress.json"), progress(described, [stream]))
    stream.close()
    return [temporary_path(folder / "n.npy"), folder / "n.npy.progress.json"]


def prepare_half_searches(folder: Path) -> list[Path]:
    """The same of saved searches, of which there are two arrays."""
    prepare_searches(folder)
    (place,) = (path for path in (folder / "s").iterdir() if path.name.startswith("searches-"))
    sidecar = json.loads((place / "searches.json").read_text())
    whole = {name: np.load(place / f"{name}.npy") for name in ("ids", "distances")}
    for path in files_in(place):
        path.unlink()
    streams = [ArrayStream(str(place / f"{name}.npy"), a.dtype.str, a.shape[1:]) for name, a in whole.items()]
    for stream, array in zip(streams, whole.values(), strict=True):
        stream.append(array[:8])
        stream.flush()
    described = {name: sidecar[name] for name in sidecar if name not in ("kind", "format_version", "content", "digest")}
    write_progress(str(place / "progress.json"), progress(described, streams))
    for stream in streams:
        stream.close()
    return [*(temporary_path(place / f"{name}.npy") for name in whole), place / "progress.json"]


def row_digest(rows: np.ndarray) -> str:
    """As progress files keep it."""
    digest = RowDigest()
    digest.add(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return digest.text()


Part = Callable[[Path], Any]
ARTEFACTS: dict[str, tuple[Part, Callable[[Path], bytes]]] = {
    "datastore": (prepare_datastore, read_datastore),
    "datastore, half saved": (prepare_half_datastore, read_half_datastore),
    "index, described": (prepare_index, read_index),
    "index, trained": (prepare_trained, read_built),
    "index, half built": (prepare_half_index, read_built),
    "members": (prepare_members, functools.partial(read_clusters, "m.pkl")),
    "members, folder": (prepare_arrays, functools.partial(read_clusters, "c")),
    "k-means, half done": (prepare_kmeans, read_kmeans),
    "scores": (prepare_scores, read_scores),
    "searches": (prepare_searches, read_searches),
    "result of a sweep": (prepare_result, read_result),
    "points of a sweep": (prepare_points, read_points),
    "AdaptRet": (prepare_gate, read_gate),
    "AdaptRet, half trained": (prepare_gate_state, read_gate_state),
    "n-grams": (prepare_ngrams, read_ngrams),
    "neighbours": (prepare_neighbours, read_neighbours),
    "neighbours, half found": (prepare_half_neighbours, read_neighbours),
    "searches, half done": (prepare_half_searches, read_searches),
}
