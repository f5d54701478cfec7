"""Sidecars: a sidecar is a small JSON file beside an artefact that describes it, so that sizes and types need not be
given as flags, and files that do not belong together give an error instead of a wrong perplexity. Artefacts without a
sidecar (downloads) are accepted.

A sidecar has a digest of itself, since a changed number in it could change results like one in the artefact."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

from fairseq.errors import BadFile, MissingFile
from fairseq.files.atomic_io import read_json, write_json
from fairseq.refusals import refuse

FORMAT_VERSION = 1
OWN_DIGEST = "digest"
FOLDER_KINDS = ("clusters", "scores", "searches", "ngrams")  # artefacts that are a folder, with their sidecar inside


def sidecar_path(artefact: str) -> str:
    """`dstore16` -> `dstore16.json`; `knn16.index` -> `knn16.index.json`."""
    return artefact + ".json"


def write_sidecar(artefact: str, kind: str, fields: dict[str, Any]) -> None:
    """Writes the sidecar; to be called last, when the artefact is complete."""
    content = json.loads(json.dumps({"kind": kind, "format_version": FORMAT_VERSION, **fields}))
    write_json(sidecar_path(artefact), {**content, OWN_DIGEST: digest_of_fields(content)})


def digest_of_fields(content: dict[str, Any]) -> str:
    """The digest of fields that JSON can spell."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: str) -> dict[str, Any]:
    """A sidecar's fields without its digest; BadFile when the file is not a sidecar, or was changed."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadFile(path, repr(content)[:80], "a description", "make the artefact again")
    digest = content.pop(OWN_DIGEST, None)
    if digest is not None and digest != digest_of_fields(content):
        found, expected = "fields that differ from those that were written", "the description of the artefact beside it"
        remedy = f'make the artefact again (or, if you changed it on purpose, remove "{OWN_DIGEST}" from it)'
        refuse(BadFile(path, found, expected, remedy))
    return content


def read_sidecar(artefact: str, kind: str, types: dict[str, type[Any]]) -> dict[str, Any] | None:
    """The artefact's sidecar, or None when there is none.

    types: the required fields and their types; BadFile when one is missing or of another type."""
    path = sidecar_path(artefact)
    if not os.path.exists(path):
        return None
    content = _read(path)
    if content.get("kind") != kind:
        raise BadFile(path, f"kind {content.get('kind')!r:.80}", f"kind {kind!r}", "check which file this is")
    version = content.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise BadFile(path, f"format version {version!r}", f"at most {FORMAT_VERSION}", "update this program")
    for name, expected in types.items():
        value = content.get(name)
        negative = isinstance(value, int) and value < 0
        if not isinstance(value, expected) or isinstance(value, bool) or negative:
            raise BadFile(path, f"{name} {value!r}", f"a value of type {expected.__name__}", "make the artefact again")
    return content


def remove_sidecar(artefact: str) -> None:
    """Removes the old sidecar; to be called right before new files are renamed, so that it never describes these."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sidecar_path(artefact))


def peek_sidecar(artefact: str) -> dict[str, Any]:
    """The fields of the artefact's sidecar, whose kind and types are not checked; empty when it has no sidecar."""
    path = sidecar_path(artefact)
    return _read(path) if os.path.exists(path) else {}


def read_any_sidecar(path: str) -> tuple[str, dict[str, Any]]:
    """(artefact, fields of its sidecar) for a datastore's prefix or one of its files, another artefact's file, or a
    folder that is an artefact; MissingFile when there is no sidecar."""
    stem = path.removesuffix(".json")
    for ending in ("_keys.npy", "_vals.npy", "_weights.npy"):
        stem = stem.removesuffix(ending)
    for artefact in (stem, *(os.path.join(path, kind) for kind in FOLDER_KINDS)):
        if os.path.exists(sidecar_path(artefact)):
            return artefact, _read(sidecar_path(artefact))
    raise MissingFile(sidecar_path(stem), "only what this package wrote has a description to be compared with")
