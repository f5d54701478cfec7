"""Whether an index or clusters belong to a datastore: their sidecars hold `datastore_files`, quick digests of the files
that they were made from."""

from __future__ import annotations

import os

from fairseq.errors import BadFile
from fairseq.fingerprint import quick_fingerprint
from fairseq.refusals import refuse
from fairseq.retrieval.datastore import Datastore, keys_path, values_path
from fairseq.retrieval.sidecar import peek_sidecar


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
