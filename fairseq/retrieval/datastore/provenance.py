"""Whether things belong together, as far as their sidecars tell: an index or clusters to a datastore, by
`datastore_files`, quick digests of the files that they were made from; a datastore to the model that asks it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.errors import BadFile, BadFlag
from fairseq.files.fingerprint import quick_fingerprint
from fairseq.files.sidecar import peek_sidecar, read_sidecar
from fairseq.refusals import refuse
from fairseq.retrieval.datastore.reader import KIND, Datastore, keys_path, values_path


def datastore_files(datastore: Datastore) -> dict[str, str]:
    """By what an index or clusters know their datastore: quick digests of its files."""
    paths = {"keys": keys_path(datastore.prefix), "values": values_path(datastore.prefix)}
    return {name: quick_fingerprint(path) for name, path in paths.items() if os.path.isfile(path)}


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


def check_asked_by(prefix: str, asking: Mapping[str, Any], places: Sequence[str]) -> None:
    """Refuses datastore `prefix` for queries of a model with other weights, another dictionary or key type.

    `asking` describes the queries' source as a datastore's sidecar does the keys'; `places`: where it has its weights,
    its dictionary, the number of words and the key type from, for the sentence."""
    kept = _source_of(read_sidecar(prefix, KIND, {}) or {})
    for (name, present), place in zip(_source_of(asking).items(), places, strict=True):
        if None not in (kept[name], present) and kept[name] != present:
            found = f"{prefix}, saved with the {name} {_short(kept[name])}"
            remedy = "use the datastore that was saved with these, or go on with --force"
            refuse(BadFlag("--dstore-filename", found, f"the {name} {_short(present)} of {place}", remedy))


def _source_of(info: Mapping[str, Any]) -> dict[str, Any]:
    data = info.get("data")
    dictionary = data.get("dict.txt") if isinstance(data, dict) else None
    weights, vocabulary, key_type = (info.get(name) for name in ("weights", "vocabulary", "key_type"))
    return {"weights": weights, "dictionary": dictionary, "vocabulary": vocabulary, "key type": key_type}


def _short(value: Any) -> str:
    """Digests are cut: the first digits tell them apart."""
    return ", ".join(_short(part) for part in value) if isinstance(value, list) else str(value)[:16]
