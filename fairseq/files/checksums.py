"""Whether the files of an artefact still have the bytes that were written. A sidecar's `content` holds, for each file,
up to 64 digests of consecutive pieces, for `fairseq-doctor verify`, which reads everything and says where a byte is
wrong; and one of 64 samples of 64 KiB (all of a file up to 4 MiB), for every opening, which reads only those."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from fairseq.errors import BadFile
from fairseq.files.sidecar import peek_sidecar
from fairseq.refusals import refuse

PIECES = 64
SAMPLE = 1 << 16
READ = 1 << 22


def describe_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sidecar's digests of a file: {"bytes", "samples", "pieces"}."""
    return {"bytes": os.path.getsize(path), "samples": _samples(path), "pieces": list(_pieces(path))}


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _piece_size(size: int) -> int:
    return max(SAMPLE, -(-size // PIECES))


def _pieces(path: str | os.PathLike[str]) -> Iterator[str]:
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        for start in range(0, size, _piece_size(size)):
            left, digest = min(_piece_size(size), size - start), _digest()
            while left and (block := stream.read(min(READ, left))):
                digest.update(block)
                left -= len(block)
            yield digest.hexdigest()


def _samples(path: str | os.PathLike[str]) -> str:
    """Digest of the first 64 KiB of each piece, and of the last 64 KiB."""
    size, digest = os.path.getsize(path), _digest()
    with open(path, "rb") as stream:
        for start in [*range(0, size, _piece_size(size)), max(0, size - SAMPLE)]:
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def check_samples(path: str, content: Any) -> None:
    """Refuses a file that is not the one described by `content` (None: nothing is known), as far as samples tell."""
    if not isinstance(content, dict) or "samples" not in content:
        return
    if os.path.getsize(path) != content.get("bytes") or _samples(path) != content["samples"]:
        found = "bytes that differ from those that were written"
        refuse(BadFile(path, found, "the content that its sidecar describes", f"run fairseq-doctor verify {path}"))


def verify(path: str, content: Any) -> str | None:
    """A sentence about what is wrong with a file, None when every byte is as described."""
    if not isinstance(content, dict) or not isinstance(content.get("pieces"), list):
        return f"{path}: its sidecar has no digests, so nothing can be verified"
    if not os.path.isfile(path):
        return f"{path}: is missing"
    size = os.path.getsize(path)
    if size != content.get("bytes"):
        return f"{path}: has {size} bytes where {content.get('bytes')} were written"
    step = _piece_size(size)
    for number, (found, expected) in enumerate(zip(_pieces(path), content["pieces"], strict=False)):
        if found != expected:
            return f"{path}: bytes {number * step} to {min(size, (number + 1) * step)} differ from those written"
    return None


def check_opened(artefact: str, files: dict[str, str]) -> None:
    """Samples the content of an artefact's files (name in the sidecar -> path) against its sidecar, if it has one."""
    content = peek_sidecar(artefact).get("content")
    if isinstance(content, dict):
        for name, file in files.items():
            if os.path.isfile(file):  # who opens a missing one says so
                check_samples(file, content.get(name))
