"""Checks by sidecars that artefacts belong together: an index or clusters to a datastore, by `datastore_files` (quick
digests of the files that they were made from), and a datastore to the model whose queries search it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.errors import BadFile, BadFlag
from fairseq.files.checksums import sample_digest
from fairseq.files.fingerprint import VOCABULARIES, quick_fingerprint
from fairseq.files.sidecar import peek_sidecar, read_sidecar
from fairseq.refusals import refuse
from fairseq.retrieval.datastore.reader import KIND, Datastore, keys_path, values_path

SOURCE = ("weights", "data", "vocabulary", "key_type", "key_module")  # a sidecar's fields: what keys came from
DIGEST = re.compile(r"[0-9a-f]{32}")


def datastore_files(datastore: Datastore) -> dict[str, str]:
    """The `datastore_files` of the sidecar of an index or of clusters: quick digests of the datastore's files."""
    paths = {"keys": keys_path(datastore.prefix), "values": values_path(datastore.prefix)}
    return {name: quick_fingerprint(path) for name, path in paths.items() if os.path.isfile(path)}


def datastore_identity(datastore: Datastore) -> dict[str, Any]:
    """Identifies the datastore of an unfinished job: the fields of its sidecar; without a sidecar (or with one that has
    no digests) also digests of samples from all over its files, since other keys may have the same size."""
    description = datastore.info or {"rows": datastore.size, "dimension": datastore.dimension}
    if isinstance(description.get("content"), dict):
        return description
    paths = {"keys": keys_path(datastore.prefix), "values": values_path(datastore.prefix)}
    samples = {name: sample_digest(path) for name, path in paths.items() if os.path.isfile(path)}
    return {**description, "samples": samples}


def check_belongs(flag: str, artefact: str, datastore: Datastore) -> None:
    """Refuses an index or clusters made from another datastore than `datastore`. Artefacts without a sidecar, or with a
    sidecar without this field, are accepted."""
    recorded = peek_sidecar(artefact).get("datastore_files")
    if not isinstance(recorded, dict):
        return
    present = datastore_files(datastore)
    for name, digest in present.items():
        if recorded.get(name, digest) != digest:
            found = f"{artefact}, which was made from a datastore with {name} {str(recorded[name])[:12]}"
            expected = f"one of {datastore.prefix}, whose {name} are {digest[:12]}"
            remedy = "make it again from this datastore, give the other one, or go on with --force"
            refuse(BadFile(flag, found, expected, remedy))


def check_query_model(prefix: str, query_model: Mapping[str, Any], places: Sequence[str]) -> list[str]:
    """Refuses datastore `prefix` for queries of a model with other weights, another dictionary or key type, or of the
    input of another module; returns the names of the properties that could be compared.

    query_model: describes the model of the queries with the fields of a datastore's sidecar; places: where its weights,
    its dictionary, the number of words, the key type and the module were read from, for the error message."""
    kept = read_sidecar(prefix, KIND, {}) or {}
    made = f"{prefix}, saved with"
    return _check_source("--dstore-filename", made, "the datastore that was saved", kept, query_model, places)


def check_gate(path: str, kept: Mapping[str, Any], query_model: Mapping[str, Any], places: Sequence[str]) -> None:
    """Refuses an AdaptRet checkpoint for queries of another model than the one on whose scores, described by `kept`, it
    was trained. query_model, places: see `check_query_model`."""
    learned = f"{path}, trained on scores with"
    _check_source("--adaptret-checkpoint", learned, "a checkpoint that was trained", kept, query_model, places)


def _check_source(
    flag: str, made: str, other: str, kept: Mapping[str, Any], query_model: Mapping[str, Any], places: Sequence[str]
) -> list[str]:
    """The names of the properties that both descriptions have, and that were therefore compared."""
    before, compared = source_of(kept), []
    for (name, present), place in zip(source_of(query_model).items(), places, strict=True):
        if None in (before[name], present):
            continue
        compared.append(name)
        if before[name] != present:
            found, expected = f"{made} the {name} {_short(before[name])}", f"the {name} {_short(present)} of {place}"
            remedy = f"use {other} with these, or go on with --force"
            ours, theirs = query_model.get("precision"), kept.get("precision")
            if name == "weights" and None not in (ours, theirs) and ours != theirs:
                found, expected = f"{found} in {theirs}", f"{expected} in {ours}"
                remedy = f"open the model in {theirs} (--hf-dtype {theirs}, dtype=torch.{theirs}), {remedy}"
            refuse(BadFlag(flag, found, expected, remedy))
    return compared


def source_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of a sidecar that identify the model and text of its keys or queries."""
    data = info.get("data")
    digests = [data.get(name) for name in VOCABULARIES] if isinstance(data, dict) else []
    dictionary = next(filter(None, digests), None)
    weights, vocabulary, key_type, module = map(info.get, ("weights", "vocabulary", "key_type", "key_module"))
    found = {"weights": weights, "dictionary": dictionary, "vocabulary": vocabulary}
    return {**found, "key type": key_type, "key module": module}


def _short(value: Any) -> str:
    """A value for an error message; digests are cut to their first digits."""
    if isinstance(value, list):
        return ", ".join(_short(part) for part in value)
    return str(value)[:16] if DIGEST.fullmatch(str(value)) else str(value)[:200]
