"""What retrieval reads, by every kind of wrong: datastores, indexes and clusters, with and without descriptions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse
import torch

from fairseq.errors import UserError
from fairseq.files.sidecar import write_sidecar
from fairseq.retrieval.clusters import Clusters, load_clusters, save_clusters
from fairseq.retrieval.datastore import Datastore, read_weights
from fairseq.retrieval.datastore.provenance import check_belongs
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.index import FaissIndex
from tests.formats.kinds_of_wrong import KINDS, NoSuchThing, Reader, Refused, Same, in_file, npy_bytes

ROWS, WIDTH, WORDS, CLUSTERS = 300, 16, 100, 20


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, WIDTH)).astype("<f2"), rng.integers(4, WORDS, ROWS)


def raw(folder: Path) -> None:
    keys, values = arrays()
    keys.tofile(folder / "d_keys.npy")
    values.astype("<i8").tofile(folder / "d_vals.npy")
    (1 + np.arange(ROWS) % 5).astype("<i8").tofile(folder / "d_weights.npy")


def described(folder: Path) -> None:
    keys, values = arrays()
    writer = DatastoreWriter(str(folder / "d"), ROWS, WIDTH, True, {"vocabulary": WORDS})
    writer.append(keys.astype(np.float32), values)
    writer.finish({"vocabulary": WORDS})


def as_type(read: str, write: str) -> Any:
    return lambda content: np.frombuffer(content, read).astype(write).tobytes()


def patched(read: str, place: int, number: float) -> Any:
    def change(content: bytes) -> bytes:
        numbers = np.frombuffer(content, read).copy()
        numbers[place] = number
        return numbers.tobytes()

    return change


def replaced_after_saving(name: str, read: str) -> Any:
    """Files of this project's writer, one of them replaced by a file of the same length from elsewhere."""

    def change(folder: Path) -> None:
        described(folder)
        in_file(name, lambda content: np.frombuffer(content, read)[::-1].tobytes())(folder)

    return change


# ---------------------------------------------------------------------------------------------------------------------
# Datastores


def read_keys(folder: Path) -> Any:
    return Datastore.open(str(folder / "d"), dimension=WIDTH).read_keys(slice(None)).tobytes()


def read_values(folder: Path) -> Any:
    store = Datastore.open(str(folder / "d"), dimension=WIDTH)
    store.check_words(WORDS)
    return store.values.tolist()


def read_weights_of(folder: Path) -> Any:
    return read_weights(Datastore.open(str(folder / "d"), dimension=WIDTH)).tolist()


NO_WORDS = NoSuchThing("the file holds no words")
KEYS = Reader(
    raw,
    read_keys,
    {
        "too short": Refused(in_file("d_keys.npy", lambda c: c[: -2 * WIDTH]), r"d_keys.npy: found \d+ bytes"),
        "too long": Refused(in_file("d_keys.npy", lambda c: c + c[: 2 * WIDTH]), r"d_keys.npy: found \d+ bytes"),
        "other type": Refused(in_file("d_keys.npy", as_type("<f2", "<f8")), r"d_keys.npy: found \d+ bytes"),
        "other endianness": Refused(in_file("d_keys.npy", as_type("<f2", ">f2")), "big-endian float16"),
        "header": Same(in_file("d_keys.npy", lambda c: npy_bytes(np.frombuffer(c, "<f2").reshape(ROWS, WIDTH)))),
        "other owner": Refused(replaced_after_saving("d_keys.npy", "<f2"), "d_keys.npy: found bytes that differ"),
        "other vocabulary": NO_WORDS,
        "non-finite": Refused(in_file("d_keys.npy", patched("<f2", 17 * WIDTH, np.nan)), "row 17, which is not finite"),
        "empty": Refused(in_file("d_keys.npy", lambda c: b""), "d_keys.npy: found 0 bytes"),
    },
)
VALUES = Reader(
    raw,
    read_values,
    {
        "too short": Refused(in_file("d_vals.npy", lambda c: c[:-4]), r"d_vals.npy: found \d+ bytes"),
        "too long": Refused(in_file("d_vals.npy", lambda c: c + c[:80]), r"d_keys.npy: found \d+ bytes"),
        "other type": Refused(in_file("d_vals.npy", as_type("<i8", "<f4")), "tokens as float32"),
        "other endianness": Refused(in_file("d_vals.npy", as_type("<i8", ">i8")), "tokens as big-endian int64"),
        "header": Same(in_file("d_vals.npy", lambda c: npy_bytes(np.frombuffer(c, "<i8").reshape(-1, 1)))),
        "other owner": Refused(replaced_after_saving("d_vals.npy", "<i8"), "d_vals.npy: found bytes that differ"),
        "other vocabulary": Refused(in_file("d_vals.npy", patched("<i8", 7, WORDS)), f"values from 4 to {WORDS}"),
        "non-finite": Refused(
            in_file("d_vals.npy", lambda c: np.full(ROWS, np.nan, "<f8").tobytes()), "d_vals.npy: found numbers"
        ),
        "empty": Refused(in_file("d_vals.npy", lambda c: b""), "d_vals.npy: found no values"),
    },
)
WEIGHTS = Reader(
    raw,
    read_weights_of,
    {
        "too short": Refused(in_file("d_weights.npy", lambda c: c[:-8]), r"d_weights.npy: found \d+ bytes"),
        "too long": Refused(in_file("d_weights.npy", lambda c: c + c[:8]), r"d_weights.npy: found \d+ bytes"),
        "other type": Refused(in_file("d_weights.npy", as_type("<i8", "<f8")), "d_weights.npy: found weights from"),
        "other endianness": Refused(in_file("d_weights.npy", as_type("<i8", ">i8")), "d_weights.npy: found weights"),
        "header": Same(in_file("d_weights.npy", lambda c: npy_bytes(np.frombuffer(c, "<i8").reshape(-1, 1)))),
        "other owner": NoSuchThing("only a sidecar could tell, and then its digests do"),
        "other vocabulary": NO_WORDS,
        "non-finite": Refused(
            in_file("d_weights.npy", lambda c: np.full(ROWS, np.inf, "<f8").tobytes()), "d_weights.npy: found weights"
        ),
        "empty": Refused(in_file("d_weights.npy", lambda c: b""), "d_weights.npy: found 0 bytes"),
    },
)


# ---------------------------------------------------------------------------------------------------------------------
# Indexes and clusters


def write_flat(folder: Path, keys: np.ndarray | None = None) -> None:
    raw(folder)
    index = faiss.IndexFlatL2(WIDTH)
    index.add(arrays()[0].astype(np.float32) if keys is None else keys)
    faiss.write_index(index, str(folder / "i"))


def read_index(folder: Path) -> Any:
    store = Datastore.open(str(folder / "d"), dimension=WIDTH)
    index = FaissIndex(str(folder / "i"), ROWS)
    check_belongs("--indexfile", str(folder / "i"), store)
    queries = torch.from_numpy(arrays()[0][:9].astype(np.float32))
    given = index.distances(queries, torch.arange(9), torch.arange(9, 18))
    return index.search(queries, 5)[1].tolist(), given.tolist()


def binary_index(folder: Path) -> None:
    index = faiss.IndexBinaryFlat(8 * WIDTH)
    index.add(np.zeros((ROWS, WIDTH), np.uint8))
    faiss.write_index_binary(index, str(folder / "i"))


def infinite_index(folder: Path) -> None:
    keys = arrays()[0].astype(np.float32)
    keys[9] = np.nan
    write_flat(folder, keys)


def swapped_words(content: bytes) -> bytes:
    return np.frombuffer(content[: len(content) // 4 * 4], ">u4").astype("<u4").tobytes()


INDEX = Reader(
    write_flat,
    read_index,
    {
        "too short": Refused(in_file("i", lambda c: c[:-9]), "i: found a file that FAISS cannot read"),
        "too long": NoSuchThing("FAISS stops where the index ends; a sidecar's digests tell"),
        "other type": Refused(binary_index, "i: found a file that FAISS cannot read"),
        "other endianness": Refused(in_file("i", swapped_words), "i: found a file that FAISS cannot read"),
        "header": Refused(in_file("i", lambda c: npy_bytes(np.frombuffer(c, "u1"))), "FAISS cannot read"),
        "other owner": Refused(
            lambda folder: write_sidecar(str(folder / "i"), "index", {"datastore_files": {"keys": "0" * 32}}),
            "--indexfile: found .*made from a datastore with keys 000",
        ),
        "other vocabulary": NO_WORDS,
        "non-finite": Refused(infinite_index, "i: found entry 9"),
        "empty": Refused(in_file("i", lambda c: b""), "i: found a file that FAISS cannot read"),
    },
)


def matrix(**changes: Any) -> Any:
    made = scipy.sparse.csr_matrix((np.ones(ROWS, np.int64), (np.arange(ROWS) % CLUSTERS, np.arange(ROWS))))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def members(made: Any) -> Any:
    return lambda folder: (folder / "m.pkl").write_bytes(pickle.dumps(made))


def read_members(folder: Path) -> Any:
    clusters = load_clusters(str(folder / "m.pkl"), ROWS)
    clusters.check()
    return clusters.members.tolist(), clusters.indptr.tolist()


MEMBERS = Reader(
    members(matrix()),
    read_members,
    {
        "too short": Refused(in_file("m.pkl", lambda c: c[:-9]), "m.pkl"),
        "too long": NoSuchThing("a pickle ends where it says; a sidecar's digests tell"),
        "other type": Refused(members(np.ones((CLUSTERS, ROWS))), "m.pkl: found a pickled ndarray"),
        "other endianness": Same(members(matrix(indices=matrix().indices.astype(">i4")))),
        "header": Refused(in_file("m.pkl", lambda c: npy_bytes(np.frombuffer(c, "u1"))), "m.pkl"),
        "other owner": Refused(members(scipy.sparse.csr_matrix((CLUSTERS, ROWS + 1))), "members up to entry"),
        "other vocabulary": NO_WORDS,
        "non-finite": Refused(members(matrix(indices=np.full(ROWS, np.nan))), "m.pkl: found "),
        "empty": Refused(in_file("m.pkl", lambda c: b""), "m.pkl"),
    },
)
TRANSPOSED = Refused(members(scipy.sparse.csr_matrix(matrix().T)), "entries x clusters.*transpose it")


def write_arrays(folder: Path) -> None:
    save_clusters(str(folder / "c"), Clusters.from_assignment(np.arange(ROWS) % CLUSTERS), {})


def read_arrays(folder: Path) -> Any:
    clusters = load_clusters(str(folder / "c"), ROWS)
    clusters.check()
    return clusters.members.tolist()


def array_file(change: Any) -> Any:
    """A changed array whose description fits, as far as its bytes go."""

    def apply(folder: Path) -> None:
        path = folder / "c" / "members.npy"
        path.write_bytes(change(np.load(path)))
        write_sidecar(str(folder / "c" / "clusters"), "clusters", {"entries": ROWS, "clusters": CLUSTERS})

    return apply


CLUSTER_ARRAYS = Reader(
    write_arrays,
    read_arrays,
    {
        "too short": Refused(array_file(lambda a: npy_bytes(a)[:-4]), "c/members.npy"),
        "too long": Refused(array_file(lambda a: npy_bytes(a) + b"1234"), "c/members.npy"),
        "other type": Refused(array_file(lambda a: npy_bytes(a.astype("<i2"))), "found .*<i2"),
        "other endianness": Refused(array_file(lambda a: npy_bytes(a.astype(">i4"))), "found .*>i4"),
        "header": Refused(array_file(lambda a: a.tobytes()), "c/members.npy"),
        "other owner": Refused(
            lambda folder: save_clusters(str(folder / "c"), Clusters.from_assignment(np.arange(ROWS + 9) % 20), {}),
            "c: found arrays of lengths",
        ),
        "other vocabulary": NO_WORDS,
        "non-finite": Refused(array_file(lambda a: npy_bytes(np.full(len(a), np.nan))), "found .*<f8"),
        "empty": Refused(array_file(lambda a: b""), "c/members.npy"),
    },
)


def sidecar(change: Any) -> Any:
    return in_file("d.json", change)


def edited(**changes: Any) -> Any:
    return sidecar(lambda content: json.dumps({**json.loads(content), **changes}).encode())


SIDECAR = Reader(
    described,
    read_values,
    {
        "too short": Refused(sidecar(lambda c: c[:-9]), "d.json"),
        "too long": Refused(sidecar(lambda c: c + c), "d.json"),
        "other type": Refused(sidecar(lambda c: b"[1, 2]"), "d.json"),
        "other endianness": Refused(sidecar(lambda c: c.decode().encode("utf-16")), "d.json"),
        "header": Refused(sidecar(lambda c: b"\xef\xbb\xbf" + c), "d.json"),
        "other owner": Refused(edited(kind="index"), "d.json"),
        "other vocabulary": Refused(edited(vocabulary=WORDS + 1), "d.json"),
        "non-finite": Refused(edited(rows=float("nan")), "d.json"),
        "empty": Refused(sidecar(lambda c: b""), "d.json"),
    },
)
READERS = {
    "datastore keys": KEYS,
    "datastore values": VALUES,
    "datastore weights": WEIGHTS,
    "index": INDEX,
    "members": MEMBERS,
    "cluster arrays": CLUSTER_ARRAYS,
    "sidecar": SIDECAR,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_every_kind_for_every_reader(name: str, kind: str, tmp_path: Path) -> None:
    reader = READERS[name]
    cell = reader.cells[kind]  # none may be missing
    if isinstance(cell, NoSuchThing):
        assert cell.why
        return
    reader.write(tmp_path)
    before = reader.read(tmp_path)
    cell.change(tmp_path)
    if isinstance(cell, Same):
        assert reader.read(tmp_path) == before
        return
    with pytest.raises(UserError, match=cell.says) as caught:
        reader.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_transposed_members(tmp_path: Path) -> None:
    TRANSPOSED.change(tmp_path)
    with pytest.raises(UserError, match=TRANSPOSED.says):
        read_members(tmp_path)
