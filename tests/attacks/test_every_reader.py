"""Each of retrieval's readers with each kind of wrong input, by a table in which no cell may be missing. The input
either does not change the reader's result to the bit (an unfinished job starts from the beginning), or is refused in
one sentence.

Kinds that change bytes are done to every artefact twice: as it is, where digests tell, and without digests, where only
what a file says of itself can. What cannot be known then is listed, here and in docs/robustness.md."""

from __future__ import annotations

import functools
import io
import logging
import os
import pickle
import random
import signal
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from fairseq.errors import UserError
from fairseq.evaluation.datastore_checks import OK, WRONG, verify_artefact
from fairseq.files.atomic_io import read_json, temporary_path
from fairseq.files.sidecar import FOLDER_KINDS
from fairseq.retrieval.clusters.members import load_clusters
from fairseq.retrieval.datastore.provenance import check_belongs, check_gate, check_query_model
from fairseq.retrieval.retrievers.adaptret import Gate
from fairseq.retrieval.retrievers.adaptret_network import AdaptRet
from fairseq.retrieval.retrievers.ngrams import count_ngrams
from fairseq.retrieval.saved.scores import ScoreCache
from tests.descriptions import edit_description
from tests.formats.kinds_of_wrong import KINDS, npy_bytes
from tests.fuzz import retrieval_readers as of
from tests.fuzz.campaign import restore
from tests.fuzz.retrieval_readers import ARTEFACTS

SECONDS = 60
SEALED = ("result of a sweep", "AdaptRet, half trained")  # one file, which has its digest in it
PARTLY = (  # likewise
    "datastore, half saved",
    "index, half built",
    "k-means, half done",
    "points of a sweep",
    "neighbours, half found",
    "searches, half done",
)
MOST_FILES = 2  # of an artefact with many that are alike


@functools.cache
def whole(name: str, folder: Path) -> tuple[dict[Path, bytes], list[Path], bytes]:
    """(all files, those to damage, the answer) of an artefact, made once in `folder`."""
    folder.mkdir()
    prepare, read = ARTEFACTS[name]
    paths = prepare(folder)
    originals = {path: path.read_bytes() for path in of.files_in(folder)}
    answer = read(folder)
    return originals, paths, answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings are expected by the thousand; what is read is too small for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


class Hung(BaseException):
    pass


def outcome(name: str, place: Path) -> str:
    """Of a read: refused, unharmed, silent, or what went wrong."""

    def hung(*_: object) -> None:
        raise Hung

    folder, (_, _, answer) = place / name, whole(name, place / name)
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return "unharmed" if ARTEFACTS[name][1](folder) == answer else "silent"
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"more than a sentence: {error}"
    except (Exception, Hung) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds that change the bytes of any file

NPY = b"\x93NUMPY"


def as_array(raw: bytes) -> np.ndarray:
    """The numbers of a file: a `.npy`'s own, or eight bytes each."""
    return np.load(io.BytesIO(raw)) if raw.startswith(NPY) else np.frombuffer(raw[: len(raw) // 8 * 8], "<i8")


def other_type(raw: bytes) -> bytes:
    array = as_array(raw)
    other = array.astype("<f8" if array.dtype.kind == "f" else "<f4")
    return npy_bytes(other) if raw.startswith(NPY) else other.tobytes()


def other_endianness(raw: bytes) -> bytes:
    array = as_array(raw)
    if array.itemsize == 1:
        return npy_bytes(array.view(np.uint8))  # truth values have no byte order; another type it is
    return npy_bytes(array.astype(array.dtype.newbyteorder(">"))) if raw.startswith(NPY) else array.byteswap().tobytes()


def with_or_without_header(raw: bytes) -> bytes:
    return as_array(raw).tobytes() if raw.startswith(NPY) else npy_bytes(np.frombuffer(raw, np.uint8))


def flipped(raw: bytes) -> Iterator[bytes]:
    generator = random.Random(len(raw))
    for _ in range(4):
        data = bytearray(raw)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        yield bytes(data)


def cut(raw: bytes) -> Iterator[bytes]:
    generator = random.Random(len(raw) + 1)
    return (raw[: generator.randrange(1, len(raw))] for _ in range(3))


BYTES: dict[str, Callable[[bytes], list[bytes]]] = {
    "too short": lambda raw: [raw[:-1], raw[:-8]],
    "too long": lambda raw: [raw + b"\0", raw + bytes(8), raw + raw],
    "other type": lambda raw: [other_type(raw)],
    "other endianness": lambda raw: [other_endianness(raw)],
    "header": lambda raw: [with_or_without_header(raw)],
    "empty": lambda raw: [b""],
    "bit flips": lambda raw: list(flipped(raw)),
    "truncated": lambda raw: list(cut(raw)),
}


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    os.truncate(path, 1 << 40)


INODES: dict[str, Callable[[Path], None]] = {"FIFO": fifo, "endless": endless}


def some(paths: list[Path]) -> list[Path]:
    """All of a few files; of many the first ones, and all descriptions."""
    data = [path for path in paths if path.suffix != ".json"]
    return data[:MOST_FILES] + [path for path in paths if path.suffix == ".json"]


def strip(paths: list[Path]) -> None:
    """Takes the digests out of an artefact's descriptions."""
    for path in paths:
        if path.suffix == ".json":
            edit_description(path, "content")


# What nothing in the file contradicts once there are no digests. These are other numbers of the right form.
UNKNOWABLE = {("*", "bit flips")}
UNKNOWABLE |= {(name, kind) for name in ("datastore",) for kind in ("other type", "other endianness")}


@pytest.mark.parametrize("digests", ["with digests", "without"])
@pytest.mark.parametrize("kind", [*BYTES, *INODES])
@pytest.mark.parametrize("name", ARTEFACTS)
def test_bytes(name: str, kind: str, digests: str, place: Path) -> None:
    originals, paths, _ = whole(name, place / name)
    bare = digests == "without"
    if bare and name in (*SEALED, *PARTLY):
        assert not any("content" in read_json(path) for path in paths if path.suffix == ".json")
        return  # their digests cannot be taken away
    for path in some(paths):
        for variant in BYTES[kind](originals[path]) if kind in BYTES else [None]:
            restore(place / name, originals)
            if bare:
                strip(paths)
            if variant is None:
                INODES[kind](path)
            elif bare and path.suffix == ".json":
                continue  # a description without digests is looked at below
            else:
                path.write_bytes(variant)
            found = outcome(name, place)
            allowed = {"refused", "unharmed"}
            if bare and {("*", kind), (name, kind)} & UNKNOWABLE:
                allowed.add("silent")
            assert found in allowed, f"{path.name}: {found}"
            if path.is_fifo() or path.stat().st_size > 1 << 30 if path.exists() else False:
                path.unlink()
    restore(place / name, originals)


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions whose fields have other types, with a digest that fits

ODD = (None, True, -1, 0, 10**30, 1e300, float("nan"), "x", [], [[]], {}, {"a": {}}, [0] * 5)
TEXTS = (b"", b"{", b"[]", b"7", b"[" * 50000, b'{"a":' * 50000, b"\xff\xfe", b"9" * 9999)


@pytest.mark.parametrize("name", [name for name in ARTEFACTS if name not in SEALED])
def test_odd_fields(name: str, place: Path) -> None:
    """Of any field; what is left as a number of the right type is somebody's word."""
    originals, paths, _ = whole(name, place / name)
    for path in paths:
        if path.suffix != ".json":
            continue
        restore(place / name, originals)
        fields = read_json(path)
        generator = random.Random(0)
        for field in sorted(fields):
            for value in generator.sample(ODD, 3):
                restore(place / name, originals)
                edit_description(path, **{field: value})
                assert outcome(name, place) in ("refused", "unharmed", "silent"), (field, value)
        for text in TEXTS:
            restore(place / name, originals)
            path.write_bytes(text)
            assert outcome(name, place) in ("refused", "unharmed"), text[:20]
    restore(place / name, originals)


# ---------------------------------------------------------------------------------------------------------------------
# Other owners, other vocabularies, numbers that are none, crafted files: each reader has its own

PLACES = ["a", "b", "c", "d", "e"]
Cell = Callable[[Path], None]


def refused(action: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)


def same_as_fresh(name: str, place: Path, read: Callable[[Path], object]) -> None:
    """A job in a folder with an unfinished job of another identity ends as in an empty folder."""
    began, fresh = place / "began", place / "fresh"
    began.mkdir()
    fresh.mkdir()
    ARTEFACTS[name][0](began)
    if (began / "d_keys.npy").exists():  # other keys of the same size, which nothing describes
        for folder in (began, fresh):
            of.stored_keys(9).astype("<f2").tofile(folder / "d_keys.npy")
            of.stored_values().astype("<i8").tofile(folder / "d_vals.npy")
        (began / "d.json").unlink()
    assert read(began) == read(fresh)


def undescribed(place: Path) -> None:
    """An index of a datastore that never had a description, whose keys are replaced by others of the same size."""
    began, fresh = place / "began", place / "fresh"
    for folder, seed in ((began, 3), (fresh, 9)):
        folder.mkdir()
        of.stored_keys(seed).astype("<f2").tofile(folder / "d_keys.npy")
        of.stored_values().astype("<i8").tofile(folder / "d_vals.npy")
    of.build_half(began)
    of.stored_keys(9).astype("<f2").tofile(began / "d_keys.npy")
    assert of.read_built(began) == of.read_built(fresh)


def of_another_datastore(name: str, artefact: str, place: Path) -> None:
    ARTEFACTS[name][0](place)
    (place / "other").mkdir()
    other = of.write_datastore(place / "other", seed=9)
    refused(lambda: check_belongs("--x", str(place / artefact), other))


def of_another_model(place: Path) -> None:
    of.write_datastore(place)
    refused(lambda: check_query_model(str(place / "d"), {"weights": ["def"]}, PLACES))


def of_another_dictionary(place: Path) -> None:
    of.write_datastore(place)
    refused(lambda: check_query_model(str(place / "d"), {"vocabulary": of.VOCABULARY + 1}, PLACES))


def scores_of_another_model(place: Path) -> None:
    of.write_datastore(place)
    of.write_scores(place, weights=["def"])
    refused(lambda: check_query_model(str(place / "d"), ScoreCache.open(str(place / "s")).info, PLACES))


def gate_of_another(place: Path, **asking: Any) -> None:
    of.prepare_gate(place)
    kept = AdaptRet.load(str(place / "g.pt")).info["of"]
    check_gate("g.pt", kept, {"weights": ["abc"], "vocabulary": of.VOCABULARY}, PLACES)
    refused(lambda: check_gate("g.pt", kept, asking, PLACES))


def counts_of_another_text(place: Path, other: dict[str, Any], seed: int) -> None:
    known = count_ngrams(of.text(), str(place / "n"), 2, info={"data": {"dict.txt": "abc"}}, show_progress=False)
    of.gate(ngrams_of=known.identity, ngrams=str(place / "n")).save(str(place / "g.pt"))
    flags = Namespace(adaptret_checkpoint=str(place / "g.pt"), adaptret_ngrams=None)
    Gate(flags, "cpu")
    count_ngrams(of.text(seed), str(place / "m"), 2, info=other, show_progress=False)
    flags.adaptret_ngrams = str(place / "m")
    refused(lambda: Gate(flags, "cpu"))


def searches_of_other_scores(place: Path) -> None:
    of.prepare_searches(place)
    first = of.read_searches(place)
    of.write_scores(place, weights=["def"])
    description = next(place.glob("s/searches-*/searches.json"))
    known = description.read_bytes()
    assert of.read_searches(place) == first and description.read_bytes() != known  # searched again
    edit_description(description, identity={"index": "another"})
    refused(lambda: of.read_searches(place))


def half_searches_of_other_scores(place: Path) -> None:
    """They are not continued, and end as searches from the start."""
    began, fresh = place / "began", place / "fresh"
    for folder in (began, fresh):
        folder.mkdir()
    of.prepare_half_searches(began)
    of.write_scores(began, weights=["def"])
    of.prepare_searches(fresh)
    assert of.read_searches(began) == of.read_searches(fresh)


def other_identity(name: str, write: Callable[[Path], None], place: Path) -> None:
    write(place)
    refused(lambda: ARTEFACTS[name][1](place))


def points_of_others(place: Path) -> None:
    of.prepare_points(place)
    edit_description(place / "p.json", identity={"scores": "others"})


def other_words(place: Path) -> None:
    of.write_scores(place, vocabulary=6)
    refused(lambda: ScoreCache.open(str(place / "s")))


def half_saved_by_another(place: Path, **identity: Any) -> None:
    of.prepare_half_datastore(place)
    writer = of.DatastoreWriter(str(place / "d"), of.ENTRIES, of.WIDTH, True, identity)
    assert writer.written == 0
    writer.close()


def keys_that_are_none(place: Path) -> None:
    writer = of.DatastoreWriter(str(place / "d"), of.ENTRIES, of.WIDTH, True, {})
    for value in (np.nan, np.inf, 1e6):
        keys = np.full((1, of.WIDTH), value, np.float32)
        refused(lambda keys=keys: writer.append(keys, np.ones(1, int)))  # type: ignore[misc]
    writer.close()


def indexed_keys_that_are_none(place: Path) -> None:
    of.write_datastore(place)
    (place / "d.json").unlink()
    keys = np.fromfile(place / "d_keys.npy", "<f2")
    keys[-1] = np.nan
    keys.tofile(place / "d_keys.npy")
    refused(lambda: of.read_built(place))


def replaced(name: str, file: str, number: float, place: Path) -> None:
    """One number of a `.npy` file is another, and no digests contradict."""
    paths = ARTEFACTS[name][0](place)
    (path,) = place.rglob(file)
    array = np.load(path)
    array.reshape(-1)[0] = number
    np.save(path, array)
    strip(paths)
    refused(lambda: ARTEFACTS[name][1](place))


def each(name: str, changes: list[tuple[str, float]], place: Path) -> None:
    for number, (file, value) in enumerate(changes):
        (place / str(number)).mkdir()
        replaced(name, file, value, place / str(number))


def gate_that_is_none(place: Path) -> None:
    model = of.gate()
    with torch.no_grad():
        next(model.network.parameters())[0] = np.nan
    model.save(str(place / "g.pt"))
    refused(lambda: AdaptRet.load(str(place / "g.pt")))
    model = of.gate()
    model.thresholds[50] = np.nan
    model.save(str(place / "g.pt"))
    refused(lambda: AdaptRet.load(str(place / "g.pt")))


def result_with_nan(place: Path) -> None:
    result = of.setting_result()
    result.by_temperature[0, 0] = np.nan
    result.save(str(place / "w.npz"), of.IDENTITY)
    assert of.SettingResult.load(str(place / "w.npz"), of.IDENTITY, 20) is None  # evaluated again


def header(dtype: str, shape: str) -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"


HEADERS = (
    header("'|O'", "(2,)"),
    header("[('a', '<i4'), ('b', '<i4')]", "(2,)"),
    header("'<i4'", "(1000000000000,)"),
    header("'<i4'", "(-2,)"),
    header("'<i4'", "(4611686018427387904, 4)"),
    header("'<i4'", "(True, 2)"),
    header("'<i4'", "(" * 900 + ")" * 900),
    header("'<i4'", "(__import__('os').abort(),)"),
    header("'<i4'", "(2,)")[:-5],
    "{" * 5000,
    '"""',
    "",
)


def crafted_arrays(name: str, place: Path) -> None:
    """Headers that announce what is not there, nest, or are no headers; pickles in an array; later versions."""
    paths = ARTEFACTS[name][0](place)
    originals = {path: path.read_bytes() for path in of.files_in(place)}
    path = next(path for path in paths if originals[path].startswith(NPY))
    contents = [NPY + b"\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(64) for text in HEADERS]
    contents += [NPY + b"\2\0" + struct.pack("<I", 0xFFFFFFF0) + bytes(64), NPY + b"\3\0", NPY]
    for content in contents:
        restore(place, originals)
        strip(paths)
        path.write_bytes(content)
        refused(lambda: ARTEFACTS[name][1](place))


def crafted_archives(name: str, file: str, place: Path) -> None:
    """Compressed parts, parts that announce more than is there, many; arrays of other names and shapes."""
    ARTEFACTS[name][0](place)
    originals = {path: path.read_bytes() for path in of.files_in(place)}
    answer = ARTEFACTS[name][1](place)
    for compression, text, parts in ((8, HEADERS[2], 1), (0, HEADERS[2], 1), (0, HEADERS[6], 1), (0, HEADERS[0], 99)):
        restore(place, originals)
        with zipfile.ZipFile(place / file, "w", compression) as archive:
            for number in range(parts):
                content = NPY + b"\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(1 << 10)
                archive.writestr(f"{number}.npy", content)
        assert ARTEFACTS[name][1](place) == answer  # again, from the beginning


class Interface:
    """Pickles as a Namespace with these attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.attributes = attributes

    def __reduce__(self) -> Any:
        return Namespace, (), self.attributes


ADDRESS = {"shape": (8,), "typestr": "<i8", "data": (16, False), "version": 3}
PARTS: dict[str, Any] = {
    "an address": Interface(__array_interface__=ADDRESS),
    "an address as a structure": Interface(__array_struct__=16),
    "a function": Interface(__array__=None),
    "an object with a buffer": Interface(__buffer__=None, __array_interface__=ADDRESS),
    "a list": [0, 1, 2],
    "bytes": b"12345678",
    "nothing": None,
    "a number": 3,
    "a table": np.zeros((2, 2), np.int64),
    "texts": np.array(["a", "b"]),
    "times": np.zeros(3, "M8[s]"),
    "complex numbers": np.zeros(3, complex),
}


def crafted_members(place: Path) -> None:
    """An object with a shape may be read as an array, or give NumPy any address."""
    for name in ("indptr", "indices", "data", "_shape"):
        for what, part in PARTS.items():
            matrix = scipy.sparse.csr_matrix((np.ones(3, np.int64), np.arange(3), [0, 2, 3]))
            matrix.__dict__[name] = part
            (place / "m.pkl").write_bytes(pickle.dumps(matrix, 4))
            with pytest.raises(UserError) as caught:
                load_clusters(str(place / "m.pkl"), 3)
            assert "m.pkl" in str(caught.value), (name, what)


def crafted_gate(place: Path) -> None:
    """Sizes in the recipe that the tensors do not have: nothing is made for them."""
    of.gate().save(str(place / "g.pt"))
    (place / "g.pt.json").unlink()
    content = torch.load(place / "g.pt", weights_only=True)
    recipes: list[dict[str, Any]] = [{"hidden": 1 << 40}, {"layers": 10**9}, {"hidden": 1 << 62}, {"layers": 1.5}]
    recipes += [{"dropout": 7.0}, {"features": ["x"]}, {"features": "ctxt"}, {"features": []}, {"hidden": "8"}]
    recipes += [{"lr": None}, {"more": 1}, {"layers": 0}, {"seed": float("nan")}]
    changes: list[dict[str, Any]] = [{"recipe": {**content["recipe"], **recipe}} for recipe in recipes]
    changes += [{"dimension": value} for value in (1 << 40, 0, -4, 4.0, None, True, 5)]
    changes += [{"thresholds": value} for value in (None, {5: 0.0}, {"5": 0.0}, [0.0])]
    changes += [{"info": []}, {"model": []}, {"model": {}}, {"recipe": None}, {"adaptret": 2}]
    name = next(iter(content["model"]))
    tensor = content["model"][name]
    odd = (tensor.int(), tensor[:1], tensor.double(), torch.zeros(1).expand(tensor.shape), "x", torch.zeros(0))
    changes += [{"model": {**content["model"], name: value}} for value in odd]
    for change in changes:
        torch.save({**content, **change}, place / "g.pt")
        refused(lambda: AdaptRet.load(str(place / "g.pt")))


def crafted_weights(place: Path) -> None:
    of.prepare_datastore(place)
    strip(of.files_in(place))
    for weight in (0, -5):
        weights = np.ones(of.ENTRIES, "<i8")
        weights[3] = weight
        weights.tofile(place / "d_weights.npy")
        refused(lambda: of.read_datastore(place))


def crafted_codes(place: Path) -> None:
    """List numbers that the index does not have, with a digest that fits: FAISS writes where they point."""
    of.prepare_half_index(place)
    path, progress = temporary_path(place / "i.index.codes"), place / "i.index.progress.json"
    codes = np.fromfile(path, np.uint8).reshape(of.ENTRIES, -1)
    codes[:, 0] = 250
    codes.tofile(path)
    own = {name: value for name, value in read_json(progress).items() if name != "seal"}
    of.write_progress(str(progress), {**own, "digest": of.row_digest(codes)})
    refused(lambda: of.read_built(place))


def both(*cells: Cell) -> Cell:
    def cell(place: Path) -> None:
        for number, one in enumerate(cells):
            (place / f"part{number}").mkdir()
            one(place / f"part{number}")

    return cell


def cluster_others(folder: Path) -> bytes:
    others, prefix = of.stored_keys(9), str(folder / "k")
    return of.cluster_keys(others, of.RECIPE, 64, False, prefix=prefix, datastore={"samples": "others"})[0].tobytes()


def train_on_others(folder: Path) -> dict[int, float]:
    path = str(folder / "g.pt")
    return of.adaptret_network.train(of.gate_data(9), of.GATE, path, {}, progress=False).thresholds


def result_of_others(place: Path) -> None:
    of.setting_result().save(str(place / "w.npz"), {"scores": "others"})


NO_WORDS = "it has no words in it; whose it is, is another cell"
NO_FRACTIONS = "all its numbers are whole"
MADE_HERE = "its numbers come from other artefacts, where they are looked at"
BY_THE_INDEX = "damaged indexes are fuzzed without digests too (tests/fuzz/index_reader.py)"
BECOMES_WHOLE = "what is finished is read as the whole artefact, whose numbers are looked at there"
A_DESCRIPTION = "it is raw numbers and a description, whose odd fields are tested above"
SCORES: list[tuple[str, float]] = [("lm_log_probs.npy", number) for number in (np.nan, 1.0, -np.inf)]
SCORES += [("queries.npy", np.inf), ("queries.npy", np.nan), ("lm_max.npy", np.nan), ("lm_entropy.npy", np.inf)]
OUTSIDE = [of.ENTRIES, -2, 2**31 - 1, -(2**31)]
P = functools.partial
OWN_KINDS = ("other owner", "other vocabulary", "non-finite", "crafted")
CELLS: dict[str, tuple[Cell | str, Cell | str, Cell | str, Cell | str]] = {
    "datastore": (of_another_model, of_another_dictionary, keys_that_are_none, crafted_weights),
    "datastore, half saved": (
        P(half_saved_by_another, vocabulary=of.VOCABULARY, models=["def"]),
        P(half_saved_by_another, vocabulary=of.VOCABULARY + 1),
        keys_that_are_none,
        A_DESCRIPTION,
    ),
    "index, described": (
        P(of_another_datastore, "index, described", "i.index"),
        NO_WORDS,
        indexed_keys_that_are_none,
        BY_THE_INDEX,
    ),
    "index, trained": (
        both(P(same_as_fresh, "index, trained", read=of.read_built), undescribed),
        NO_WORDS,
        indexed_keys_that_are_none,
        BY_THE_INDEX,
    ),
    "index, half built": (
        both(P(same_as_fresh, "index, half built", read=of.read_built), undescribed),
        NO_WORDS,
        indexed_keys_that_are_none,
        crafted_codes,
    ),
    "members": (P(of_another_datastore, "members", "m.pkl"), NO_WORDS, NO_FRACTIONS, crafted_members),
    "members, folder": (
        P(of_another_datastore, "members, folder", "c/clusters"),
        NO_WORDS,
        NO_FRACTIONS,
        P(crafted_arrays, "members, folder"),
    ),
    "k-means, half done": (
        P(same_as_fresh, "k-means, half done", read=cluster_others),
        NO_WORDS,
        MADE_HERE,
        P(crafted_archives, "k-means, half done", "k.kmeans.tmp"),
    ),
    "scores": (scores_of_another_model, other_words, P(each, "scores", SCORES), P(crafted_arrays, "scores")),
    "searches": (
        searches_of_other_scores,
        NO_WORDS,
        P(replaced, "searches", "distances.npy", np.nan),
        both(P(crafted_arrays, "searches"), P(each, "searches", [("ids.npy", number) for number in OUTSIDE])),
    ),
    "result of a sweep": (
        P(other_identity, "result of a sweep", result_of_others),
        NO_WORDS,
        result_with_nan,
        P(crafted_archives, "result of a sweep", "w.npz"),
    ),
    "points of a sweep": (
        P(other_identity, "points of a sweep", points_of_others),
        NO_WORDS,
        MADE_HERE,
        A_DESCRIPTION,
    ),
    "AdaptRet": (
        P(gate_of_another, weights=["def"]),
        P(gate_of_another, vocabulary=of.VOCABULARY + 1),
        gate_that_is_none,
        crafted_gate,
    ),
    "AdaptRet, half trained": (
        P(same_as_fresh, "AdaptRet, half trained", read=train_on_others),
        NO_WORDS,
        MADE_HERE,
        P(crafted_archives, "AdaptRet, half trained", "g.pt.last"),
    ),
    "n-grams": (
        P(counts_of_another_text, other={"data": {"dict.txt": "abc"}}, seed=6),
        P(counts_of_another_text, other={"data": {"dict.txt": "def"}}, seed=5),
        NO_FRACTIONS,
        P(crafted_arrays, "n-grams"),
    ),
    "neighbours": (
        P(same_as_fresh, "neighbours", read=P(of.read_neighbours, seed=9)),
        NO_WORDS,
        NO_FRACTIONS,
        both(P(crafted_arrays, "neighbours"), P(each, "neighbours", [("n.npy", number) for number in OUTSIDE])),
    ),
    "neighbours, half found": (
        P(same_as_fresh, "neighbours, half found", read=P(of.read_neighbours, seed=9)),
        NO_WORDS,
        NO_FRACTIONS,
        BECOMES_WHOLE,
    ),
    "searches, half done": (
        half_searches_of_other_scores,
        NO_WORDS,
        MADE_HERE,
        BECOMES_WHOLE,
    ),
}


def test_no_cell_is_missing() -> None:
    """Each reader of the fuzzers has each kind, done or with a reason why it does not apply."""
    assert set(CELLS) == set(ARTEFACTS)
    assert {*BYTES, *OWN_KINDS} >= set(KINDS)  # what is asked of every reader of a format is asked of every artefact
    for name, cells in CELLS.items():
        assert len(cells) == len(OWN_KINDS), name
        assert all(callable(cell) or len(cell) > 10 for cell in cells), name


@pytest.mark.parametrize("number", range(len(OWN_KINDS)), ids=OWN_KINDS)
@pytest.mark.parametrize("name", CELLS)
def test_own_kinds(name: str, number: int, tmp_path: Path) -> None:
    cell = CELLS[name][number]
    if not isinstance(cell, str):
        cell(tmp_path)


DESCRIBED = [name for name in ARTEFACTS if name not in (*SEALED, *PARTLY)]


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_doctor_reads_every_byte(name: str, place: Path) -> None:
    """Every artefact with a sidecar, of any kind."""
    originals, paths, _ = whole(name, place / name)
    restore(place / name, originals)
    data = [path for path in paths if path.suffix != ".json"]
    (description,) = (path for path in paths if path.suffix == ".json")
    artefact = data[0].parent if description.stem in FOLDER_KINDS else description.with_suffix("")
    assert {finding.level for finding in verify_artefact(str(artefact))} == {OK}
    raw = bytearray(data[-1].read_bytes())
    raw[len(raw) // 2] ^= 1
    data[-1].write_bytes(raw)
    wrong = [finding.text for finding in verify_artefact(str(artefact)) if finding.level == WRONG]
    assert len(wrong) == 1 and data[-1].name in wrong[0]
    restore(place / name, originals)
