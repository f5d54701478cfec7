"""Checks of the files that a command will write, before it does any work. Devices, pipes, sockets, links and folders
are never replaced, and files of another kind than the one to be written only with `--force`. After the check the output
is locked (`output_lock`)."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.errors import BadFlag
from fairseq.files.atomic_io import kind_of_node, name_problem
from fairseq.files.output_lock import exclusive
from fairseq.refusals import refuse

FAISS_CODES = (b"Ix", b"Iw", b"Iv", b"IH", b"IF", b"IB", b"Il", b"IL")  # with which its index files begin
HEAD = 4096  # bytes by which a kind is recognised
LARGEST_JSON = 1 << 30
LARGEST_PROGRESS = 16 << 20


@dataclass(frozen=True)
class Kind:
    """A kind of file. name: with its article; fits(path, first bytes): whether a file is of it."""

    name: str
    fits: Callable[[str, bytes], bool]


def _json(path: str) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > LARGEST_JSON:
            return {}
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError, RecursionError, MemoryError):
        return {}
    return content if isinstance(content, dict) else {}


def _archive(path: str, head: bytes, marks: tuple[bytes, ...]) -> bool:
    """Whether `path` is what `torch.save` writes, and its pickle begins with one of the `marks`."""
    if not head.startswith(b"PK\x03\x04"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(names[0]) as stream:
                content = stream.read(HEAD)
    except (OSError, ValueError, IndexError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False
    return any(mark in content for mark in marks)


def _raw(path: str, head: bytes) -> bool:
    others = (RESULTS, DESCRIPTION, INDEX, ARRAY, ITEMS_INDEX)
    return not head.startswith(b"PK\x03\x04") and not any(kind.fits(path, head) for kind in others)


RESULTS = Kind("a results file", lambda path, head: head[:1] == b"{" and {"command", "versions"} <= set(_json(path)))
DESCRIPTION = Kind(
    "a description that this package wrote",
    lambda path, head: head[:1] == b"{" and {"kind", "format_version"} <= set(_json(path)),
)
# Of a name that no user chooses. A damaged one is not refused: the job starts from the beginning, and says so.
PROGRESS = Kind("the progress of an unfinished run", lambda path, head: os.path.getsize(path) <= LARGEST_PROGRESS)
INDEX = Kind("a FAISS index", lambda path, head: head[:2] in FAISS_CODES and head[2:4].isalnum())
ARRAY = Kind("a NumPy array", lambda path, head: head.startswith(b"\x93NUMPY"))
RAW = Kind("raw numbers", _raw)
PICKLE = Kind("a pickle", lambda path, head: head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")
ITEMS_INDEX = Kind("the index of a binarised text", lambda path, head: head.startswith((b"MMIDIDX", b"TNTIDX")))
CHECKPOINT = Kind(
    "a checkpoint", lambda path, head: _archive(path, head, (b"optimizer_history", b"model")) or PICKLE.fits(path, head)
)
GATE = Kind("an AdaptRet checkpoint", lambda path, head: _archive(path, head, (b"adaptret",)))
ARCHIVE = Kind("NumPy arrays in one file", lambda path, head: head.startswith(b"PK\x03\x04"))
FIGURE_KINDS = {
    "png": Kind("a PNG figure", lambda path, head: head.startswith(b"\x89PNG")),
    "svg": Kind("an SVG figure", lambda path, head: b"<svg" in head),
    "pdf": Kind("a PDF figure", lambda path, head: head.startswith(b"%PDF")),
}


def _text(path: str, head: bytes) -> bool:
    try:
        return "\0" not in head[: HEAD - 4].decode()
    except UnicodeDecodeError as error:
        return error.start > HEAD - 8  # cut in the middle of a character


LOG = Kind("a text to append to", _text)


def text_beginning(name: str, *words: str) -> Kind:
    """A kind of text file, recognised by its first words."""
    return Kind(name, lambda path, head: head.startswith(tuple(word.encode() for word in words)))


def description(kind: str) -> Kind:
    """The sidecar of an artefact of this kind (`files.sidecar`): that of another one is not replaced."""
    return Kind(
        f"a description of kind {kind!r} that this package wrote",
        lambda path, head: DESCRIPTION.fits(path, head) and _json(path).get("kind") == kind,
    )


def described(path: str, kind: Kind, sidecar: str) -> dict[str, Kind]:
    """A file, and its sidecar of the kind `sidecar`."""
    return {path: kind, path + ".json": description(sidecar)}


def stored_files(prefix: str) -> dict[str, Kind]:
    """The files that saving a datastore writes."""
    progress = {prefix + ".progress.json": PROGRESS, prefix + ".json": description("datastore")}
    return dict.fromkeys((prefix + "_keys.npy", prefix + "_vals.npy"), RAW) | progress


def score_files(folder: str, names: Iterable[str]) -> dict[str, Kind]:
    """The files that saving scores writes: an array of each name."""
    arrays = {os.path.join(folder, f"{name}.npy"): ARRAY for name in names}
    return arrays | {os.path.join(folder, "scores.json"): description("scores")}


def index_files(path: str) -> dict[str, Kind]:
    """The files that building an index writes."""
    files = described(path, INDEX, "index") | described(path + ".trained", INDEX, "index")
    return files | {path + ".progress.json": PROGRESS}


def cluster_files(folder: str, pickle: str) -> dict[str, Kind]:
    """The files that saving clusters writes."""
    arrays = {os.path.join(folder, f"{name}.npy"): ARRAY for name in ("indptr", "members", "cluster_of")}
    own = {os.path.join(folder, "clusters.json"): description("clusters")}
    return arrays | own | described(pickle, PICKLE, "members")


def check_files(flag: str, files: Mapping[str, Kind]) -> None:
    """BadFlag unless each of `files` does not exist, is empty, or is a file of its kind."""
    for path, kind in files.items():
        if problem := name_problem(path):
            raise BadFlag(flag, problem, "the name of a file to write")
        node = kind_of_node(path)
        if node is not None:
            expected = "the name of a regular file to write"
            found = f"{node.replace('a ', 'the ', 1)} {path}"
            raise BadFlag(flag, found, expected, "choose another name, or remove it yourself")
        if not os.path.exists(path):
            continue
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
        if head and not kind.fits(path, head):
            found, expected = f"{path}, which is not {kind.name}", f"a free name, or {kind.name} to replace"
            refuse(BadFlag(flag, found, expected, "choose another name, or go on with --force"))


@contextlib.contextmanager
def claimed(flag: str, output: str | None, files: Mapping[str, Kind] | None = None) -> Iterator[None]:
    """Checks the `files` that a command will write for `flag`, and locks `output` during the `with` block. Does nothing
    if `output` is None. files: by default the file `output`, of the kind RESULTS."""
    if output is None:
        yield
        return
    check_files(flag, {output: RESULTS} if files is None else files)
    with exclusive(output):
        yield
