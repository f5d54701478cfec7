"""Fingerprints of files, by which sidecars identify the model and data of an artefact."""

from __future__ import annotations

import hashlib
import os

from fairseq.files.inputs import open_input

CHUNK = 1 << 22


def file_fingerprint(path: str) -> str:
    """Hex digest (BLAKE2b, 128 bits) of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open_input(path) as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def quick_fingerprint(path: str) -> str:
    """Digest of a file's length and of its first, middle and last MiB. It is fast for large files, but does not detect
    changes elsewhere in a file of the same length. For a folder, the digest of the files in it."""
    digest = hashlib.blake2b(digest_size=16)
    if os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            digest.update(f"{name} {quick_fingerprint(os.path.join(path, name))}".encode())
        return digest.hexdigest()
    size = os.path.getsize(path)
    digest.update(str(size).encode())
    with open_input(path) as stream:
        for start in (0, size // 2, size - (1 << 20)):
            stream.seek(max(0, start))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


VOCABULARIES = ("dict.txt", "tokens.json")  # a dictionary of words, or the description of a tokenizer


def vocabulary_file(folder: str) -> str:
    """The file that says what the numbers of a data folder's texts stand for."""
    paths = [os.path.join(folder, name) for name in VOCABULARIES]
    return next(filter(os.path.isfile, paths), paths[0])


def split_fingerprints(folder: str, split: str) -> dict[str, str]:
    """Fingerprints of the dictionary and of a split's files in a data folder, by file name; absent files are left
    out."""
    names = [*VOCABULARIES, split + ".bin", split + ".idx", split, split + ".None-None"]
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: file_fingerprint(path) for name, path in paths.items() if os.path.isfile(path)}
