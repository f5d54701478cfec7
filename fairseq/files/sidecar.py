"""Sidecars: the small JSON beside every artefact that says what it is, so that sizes and types need not be typed and a
mismatch is one sentence instead of a wrong perplexity. Files without one (downloads) are accepted."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from fairseq.errors import BadFile, MissingFile
from fairseq.files.atomic_io import read_json, write_json

FORMAT_VERSION = 1


def sidecar_path(artefact: str) -> str:
    """`dstore16` -> `dstore16.json`; `knn16.index` -> `knn16.index.json`."""
    return artefact + ".json"


def write_sidecar(artefact: str, kind: str, fields: dict[str, Any]) -> None:
    """Writes the sidecar; call it last, when the artefact is whole."""
    write_json(sidecar_path(artefact), {"kind": kind, "format_version": FORMAT_VERSION, **fields})


def read_sidecar(artefact: str, kind: str, types: dict[str, type[Any]]) -> dict[str, Any] | None:
    """The artefact's sidecar, or None when there is none.

    `types` names the fields that must be there, each of the given type; BadFile otherwise."""
    path = sidecar_path(artefact)
    if not os.path.exists(path):
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise BadFile(path, f"kind {content.get('kind') if isinstance(content, dict) else content!r}", f"kind {kind!r}")
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
    """To be called right before new files get their names: no old description ever stands beside them."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sidecar_path(artefact))


def peek_sidecar(artefact: str) -> dict[str, Any]:
    """Whatever is known of `artefact`, whose kind and fields are not looked at; nothing when it has no description."""
    path = sidecar_path(artefact)
    content = read_json(path) if os.path.isfile(path) else None
    return content if isinstance(content, dict) else {}


def read_any_sidecar(path: str) -> tuple[str, dict[str, Any]]:
    """(artefact, fields) for a datastore's prefix or one of its two files, an index or members file, or a folder of
    clusters; MissingFile when nothing describes it."""
    stem = path.removesuffix(".json").removesuffix("_keys.npy").removesuffix("_vals.npy")
    for artefact in (stem, os.path.join(path, "clusters")):
        if os.path.isfile(sidecar_path(artefact)):
            content = read_json(sidecar_path(artefact))
            if not isinstance(content, dict):
                raise BadFile(sidecar_path(artefact), repr(content)[:80], "a description", "write the artefact again")
            return artefact, content
    raise MissingFile(sidecar_path(stem), "only what this package wrote has a description to be compared with")
