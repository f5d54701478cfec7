"""Whether things belong together, as far as their sidecars tell: an index or clusters to a datastore, by
`datastore_files`, quick digests of the files that they were made from; a datastore to the model that asks it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.errors import BadFile, BadFlag
from fairseq.files.checksums import sample_digest
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.files.sidecar import peek_sidecar, read_sidecar
from fairseq.refusals import refuse
from fairseq.retrieval.datastore.reader import KIND, Datastore, keys_path, values_path

SOURCE = ("weights", "data", "vocabulary", "key_type")  # fields of a sidecar that say what keys came from


def datastore_files(datastore: Datastore) -> dict[str, str]:
    """By what an index or clusters know their datastore: quick digests of its files."""
    paths = {"keys": keys_path(datastore.prefix), "values": values_path(datastore.prefix)}
    return {name: quick_fingerprint(path) for name, path in paths.items() if os.path.isfile(path)}


def datastore_identity(datastore: Datastore) -> dict[str, Any]:
    """By what an unfinished job knows the datastore that it works on: its sidecar; without one (or with one that has no
    digests) also digests of samples from all over its files, since other keys may have the same size."""
    known = datastore.info or {"rows": datastore.size, "dimension": datastore.dimension}
    if isinstance(known.get("content"), dict):
        return known
    paths = {"keys": keys_path(datastore.prefix), "values": values_path(datastore.prefix)}
    return {**known, "samples": {name: sample_digest(path) for name, path in paths.items() if os.path.isfile(path)}}


def check_belongs(flag: str, artefact: str, datastore: Datastore) -> None:
    """Refuses an index or clusters made from another datastore than `datastore`. Artefacts without a sidecar, or with
    one that does not say, pass."""
    known = peek_sidecar(artefact).get("datastore_files")
    if not isinstance(known, dict):
        return
    present = datastore_files(datastore)
    for name, digest in present.items():
        if known.get(name, digest) != digest:
            found = f"{artefact}, which was made from a datastore with {name} {str(known[name])[:12]}"
            expected = f"one of {datastore.prefix}, whose {name} are {digest[:12]}"
            remedy = "make it again from this datastore, give the other one, or go on with --force"
            refuse(BadFile(flag, found, expected, remedy))


def check_asked_by(prefix: str, asking: Mapping[str, Any], places: Sequence[str]) -> list[str]:
    """Refuses datastore `prefix` for queries of a model with other weights, another dictionary or key type; returns
    what could be compared, by name.

    `asking` describes the queries' source as a datastore's sidecar does the keys'; `places`: where it has its weights,
    its dictionary, the number of words and the key type from, for the sentence."""
    kept = read_sidecar(prefix, KIND, {}) or {}
    made = f"{prefix}, saved with"
    return _check_source("--dstore-filename", made, "the datastore that was saved", kept, asking, places)


def check_gate(path: str, kept: Mapping[str, Any], asking: Mapping[str, Any], places: Sequence[str]) -> None:
    """Refuses an AdaptRet checkpoint for queries of another model than that from whose scores, described by `kept`, it
    learned; the rest as `check_asked_by`."""
    learned = f"{path}, trained on scores with"
    _check_source("--adaptret-checkpoint", learned, "a checkpoint that was trained", kept, asking, places)


def _check_source(
    flag: str, made: str, other: str, kept: Mapping[str, Any], asking: Mapping[str, Any], places: Sequence[str]
) -> list[str]:
    """The names of what both know and was compared."""
    before, compared = source_of(kept), []
    for (name, present), place in zip(source_of(asking).items(), places, strict=True):
        if None in (before[name], present):
            continue
        compared.append(name)
        if before[name] != present:
            found, expected = f"{made} the {name} {_short(before[name])}", f"the {name} {_short(present)} of {place}"
            refuse(BadFlag(flag, found, expected, f"use {other} with these, or go on with --force"))
    return compared


def source_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys, or queries, that a sidecar describes came from: by this, models are told apart."""
    data = info.get("data")
    dictionary = data.get("dict.txt") if isinstance(data, dict) else None
    weights, vocabulary, key_type = (info.get(name) for name in ("weights", "vocabulary", "key_type"))
    return {"weights": weights, "dictionary": dictionary, "vocabulary": vocabulary, "key type": key_type}


def _short(value: Any) -> str:
    """Digests are cut: the first digits tell them apart."""
    return ", ".join(_short(part) for part in value) if isinstance(value, list) else str(value)[:16]
