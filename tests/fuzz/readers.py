"""The readers under fuzzing: for each, the files it starts from, and what to do with a damaged copy. A reader must
either succeed or raise a UserError of one line; what it returns is used as the programs use it, because a value that
is accepted and makes the next step fail is a reader's mistake too."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.sparse
import torch

from fairseq import checkpoint_utils, options, tasks
from fairseq.data import Dictionary, TokenBlockDataset, data_utils
from fairseq.data.indexed_dataset import make_builder
from fairseq.evaluation.datastore_checks import verify_artefact
from fairseq.files.atomic_io import temporary_path, write_json
from fairseq.retrieval.automaton import Automaton
from fairseq.retrieval.clusters import Clusters, load_clusters, save_clusters, save_members_pickle
from fairseq.retrieval.clusters.kmeans import KMeansRecipe, cluster_keys
from fairseq.retrieval.datastore import Datastore, count_filled_rows
from fairseq.retrieval.datastore.provenance import check_belongs, datastore_files
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.entries import Entries
from tests.descriptions import edit_description
from tests.fuzz.retrieval_readers import ARTEFACTS
from tests.fuzz.text_readers import TEXTS

GOLDEN = Path(__file__).resolve().parent.parent / "fixtures" / "golden"
ENTRIES, WIDTH = 60, 4
RECIPE = KMeansRecipe(5, 40, 2)


@dataclass(frozen=True)
class Reader:
    """prepare(folder) writes whole files and returns those to damage in turn; read(folder) reads them all. compares:
    whether the files have digests, so that what is read is refused or as it was."""

    prepare: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    compares: bool = False


def small_keys() -> np.ndarray:
    """(60, 4) float32 keys."""
    return np.random.default_rng(3).standard_normal((ENTRIES, WIDTH)).astype(np.float32)


def _dictionary(folder: Path) -> list[Path]:
    dictionary = Dictionary()
    for number in range(40):
        dictionary.add_symbol(f"wörd{number}", 50 - number)
    dictionary.finalize()
    dictionary.save(str(folder / "dict.txt"))
    return [folder / "dict.txt"]


def _read_dictionary(folder: Path) -> object:
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    dictionary.string(torch.arange(len(dictionary)))
    dictionary.save(io.StringIO())
    return len(dictionary)


def _split(impl: str) -> Callable[[Path], list[Path]]:
    def prepare(folder: Path) -> list[Path]:
        builder = make_builder(str(folder / "train.bin"), impl, 60)
        for length in (5, 1, 12, 30):
            builder.add_item(torch.arange(4, 4 + length, dtype=torch.int32))
        builder.finalize(str(folder / "train.idx"))
        return [folder / "train.idx", folder / "train.bin"]

    return prepare


def _read_split(folder: Path) -> object:
    dataset = data_utils.load_indexed_dataset(str(folder / "train"))
    if dataset is None:
        return None
    for number in range(min(len(dataset), 10)):
        dataset[number]
    blocks = TokenBlockDataset(dataset, dataset.sizes, 8, pad=1, eos=2, break_mode="complete", include_targets=True)
    for number in range(min(len(blocks), 10)):
        blocks[number]
    return len(dataset)


def _datastore(folder: Path) -> list[Path]:
    keys, values = small_keys().astype(np.float16), np.arange(4, 4 + ENTRIES).astype("<i8")
    keys.tofile(folder / "d_keys.npy")
    values.tofile(folder / "d_vals.npy")
    layout = {"rows": ENTRIES, "filled_rows": ENTRIES, "dimension": WIDTH, "key_dtype": "<f2", "value_dtype": "<i8"}
    write_json(folder / "d.json", {"kind": "datastore", "format_version": 1, **layout})
    return [folder / "d.json", folder / "d.json", folder / "d_vals.npy", folder / "d_keys.npy"]


def _read_datastore(folder: Path) -> object:
    datastore = Datastore.open(str(folder / "d"))
    count_filled_rows(datastore)
    return Datastore.open(str(folder / "d"), in_memory=True).size


def _members(folder: Path) -> list[Path]:
    matrix = scipy.sparse.csr_matrix((np.ones(ENTRIES, np.int64), np.arange(ENTRIES), [0, 20, 45, ENTRIES]))
    (folder / "members.pkl").write_bytes(pickle.dumps(matrix, 4))
    return [folder / "members.pkl"]


def _read_members(folder: Path) -> object:
    return _use_clusters(load_clusters(str(folder / "members.pkl"), ENTRIES))


def _use_clusters(clusters: Clusters) -> object:
    clusters.check()
    clusters.to_csr()
    _expand(clusters)
    own = clusters.cluster_of[:ENTRIES]
    return [clusters.members[clusters.indptr[c] : clusters.indptr[c + 1]].sum() for c in own]


def _expand(clusters: Clusters) -> None:
    """What following pointers does with clusters."""
    automaton = Automaton(ENTRIES, 40, clusters)
    ids = torch.arange(ENTRIES)
    automaton.expand(Entries(ids // 6, ids), ENTRIES // 6)


def _clusters(folder: Path) -> list[Path]:
    save_clusters(str(folder / "c"), Clusters.from_assignment(np.arange(ENTRIES) % 7), {})
    edit_description(folder / "c" / "clusters.json", "content")  # or digests would refuse every change
    return [folder / "c" / name for name in ("clusters.json", "indptr.npy", "members.npy", "cluster_of.npy")]


def _read_large_clusters(folder: Path) -> object:
    """Arrays that are too large to be looked at on opening."""
    with mock.patch("fairseq.retrieval.clusters.members.CHECKED_ENTRIES", 0):
        _expand(load_clusters(str(folder / "c"), ENTRIES))
    return None


def _sidecars(folder: Path) -> list[Path]:
    writer = DatastoreWriter(str(folder / "d"), ENTRIES, WIDTH, True, {"vocabulary": 100})
    writer.append(small_keys(), np.arange(4, 4 + ENTRIES))
    writer.finish({"vocabulary": 100})
    datastore = Datastore.open(str(folder / "d"))
    clusters, origin = Clusters.from_assignment(np.arange(ENTRIES) % 7), {"datastore_files": datastore_files(datastore)}
    save_clusters(str(folder / "c"), clusters, origin)
    save_members_pickle(str(folder / "m.pkl"), clusters, origin)
    return [folder / "d.json", folder / "c" / "clusters.json", folder / "m.pkl.json"]


def _read_sidecars(folder: Path) -> object:
    for name in ("d", "d_keys.npy", "c", "m.pkl"):
        list(verify_artefact(str(folder / name)))
    datastore = Datastore.open(str(folder / "d"))
    for name in ("c/clusters", "m.pkl"):
        check_belongs("--members", str(folder / name), datastore)
    load_clusters(str(folder / "c"), ENTRIES)
    return load_clusters(str(folder / "m.pkl"), ENTRIES)


def _unfinished(folder: Path) -> list[Path]:
    clusters, state = cluster_keys(small_keys(), RECIPE, 16, False, prefix=str(folder / "k"))
    assert state.path is not None and state.assignment_path is not None and len(clusters) == ENTRIES
    assignment = temporary_path(state.assignment_path)
    os.truncate(assignment, 4 * 32)
    return [folder / "k.kmeans.tmp", assignment]


def _read_unfinished(folder: Path) -> object:
    """k-means continues from the files that exist, or starts from the beginning."""
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    clusters, state = cluster_keys(small_keys(), RECIPE, 16, False, prefix=str(folder / "k"))
    state.clear()
    for path, content in whole.items():
        path.write_bytes(content)
    return Clusters.from_assignment(clusters, RECIPE.clusters)


def _read_clusters(folder: Path) -> object:
    return _use_clusters(load_clusters(str(folder / "c"), ENTRIES))


def _checkpoint(zipped: bool) -> Callable[[Path], list[Path]]:
    def prepare(folder: Path) -> list[Path]:
        state = checkpoint_utils.read_torch_file(GOLDEN / "checkpoints" / "checkpoint_best.pt")
        torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=zipped)
        return [folder / "model.pt"]

    return prepare


def _read_checkpoint(folder: Path) -> object:
    task = _golden_task()
    models, args = checkpoint_utils.load_model_ensemble([str(folder / "model.pt")], task=task)
    models[0].eval()
    with torch.no_grad():
        models[0](torch.tensor([[2, 5, 6, 7]]))
    return args


ODD_NUMBERS = (-1, 0, 3, 10**6, 10**12, 10**30, 0.5, float("nan"))
ODD_VALUES = (*ODD_NUMBERS, None, "", "x", "1,2", [], {}, [10**9], True, b"", (1, 2))
SHAPING = ("decoder", "adaptive", "tokens", "arch")


def _options(folder: Path) -> list[Path]:
    (folder / "choice").write_bytes(b"which options are replaced follows from these bytes")
    return [folder / "choice"]


def _read_options(folder: Path) -> object:
    """A whole checkpoint, two of whose options have other values or are missing, and one of whose tensors is odd."""
    generator = random.Random((folder / "choice").read_bytes())
    state = checkpoint_utils.read_torch_file(GOLDEN / "checkpoints" / "checkpoint_best.pt")
    options_of = vars(state["args"])
    names = sorted(name for name in options_of if any(part in name for part in SHAPING))
    if (folder / "choice").read_bytes().startswith(b"which options"):
        names = []
    for name in generator.sample(names, min(len(names), 2)):
        if generator.random() < 0.2:
            del options_of[name]
        else:
            options_of[name] = generator.choice(ODD_VALUES)
    if names and generator.random() < 0.3:
        parameters = state["model"]
        name = generator.choice(sorted(parameters))
        odd = (parameters[name][:1], parameters[name].int(), parameters[name].bool(), torch.zeros(0), "text", None, 3)
        parameters[name] = generator.choice(odd)
    torch.save(state, folder / "model.pt")
    return _read_checkpoint(folder)


_TASK: list[tasks.FairseqTask] = []


def _golden_task() -> tasks.FairseqTask:
    if not _TASK:
        parser = options.get_eval_lm_parser()
        _TASK.append(tasks.setup_task(options.parse_args_and_arch(parser, [str(GOLDEN / "data-bin")])))
    return _TASK[0]


def _flags(folder: Path) -> list[Path]:
    line = "data --path a.pt --knnlm --k 8 --lmbda 0.25 --max-tokens 99 --model-overrides {'a':1} --min-knns 1"
    (folder / "flags").write_text("\n".join(line.split()))
    return [folder / "flags"]


def _read_flags(folder: Path) -> object:
    from fairseq.flag_types import literal_dict

    words = (folder / "flags").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    words = [word for word in words if word not in ("-h", "--help") and not word.startswith("--user-dir")]
    with contextlib.redirect_stdout(io.StringIO()):
        args: argparse.Namespace = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
    literal_dict("--model-overrides", args.model_overrides)
    return args


READERS: dict[str, Reader] = {
    "dict": Reader(_dictionary, _read_dictionary),
    "idx and bin": Reader(_split("mmap"), _read_split),
    "idx and bin, legacy": Reader(_split("lazy"), _read_split),
    "datastore and sidecar": Reader(_datastore, _read_datastore),
    "members, pickle": Reader(_members, _read_members),
    "members, arrays": Reader(_clusters, _read_clusters),
    "members, large arrays": Reader(_clusters, _read_large_clusters),
    "sidecars": Reader(_sidecars, _read_sidecars),
    "k-means, unfinished": Reader(_unfinished, _read_unfinished),
    "checkpoint, zip": Reader(_checkpoint(True), _read_checkpoint),
    "checkpoint, legacy": Reader(_checkpoint(False), _read_checkpoint),
    "checkpoint, options": Reader(_options, _read_options),
    "flags": Reader(_flags, _read_flags),
    **{name: Reader(prepare, read, compares=True) for name, (prepare, read) in ARTEFACTS.items()},
    **{name: Reader(*parts) for name, parts in TEXTS.items()},
}
