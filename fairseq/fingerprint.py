"""Fingerprints of files, by which sidecars say which model and data an artefact came from."""

from __future__ import annotations

import hashlib
import os

CHUNK = 1 << 22


def file_fingerprint(path: str) -> str:
    """Hex digest (BLAKE2b, 128 bits) of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def split_fingerprints(folder: str, split: str) -> dict[str, str]:
    """Fingerprints of the dictionary and of a split's files in a data folder, by file name; absent files are left
    out."""
    names = ["dict.txt", split + ".bin", split + ".idx", split]
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: file_fingerprint(path) for name, path in paths.items() if os.path.isfile(path)}
