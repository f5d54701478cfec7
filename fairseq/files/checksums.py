"""Checks that the files of an artefact have the bytes that were written. A sidecar's `content` has, for each file, up
to 64 digests of consecutive pieces, and one digest of 64 samples of 64 KiB. Opening a file compares every byte of files
up to 64 MiB, and of files that are read completely anyway; of larger files it compares the samples, so that it stays
cheap. `fairseq-doctor verify` reads every byte and says which piece is wrong."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

from fairseq.errors import BadFile, UserError
from fairseq.files.inputs import open_input, regular_size
from fairseq.files.sidecar import peek_sidecar
from fairseq.refusals import refuse

logger = logging.getLogger(__name__)

PIECES = 64
WHOLE = 64 << 20  # files up to this size are compared completely when they are opened
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
    size = regular_size(path)
    with open_input(path) as stream:
        for start in range(0, size, _piece_size(size)):
            left, digest = min(_piece_size(size), size - start), _digest()
            while left and (block := stream.read(min(READ, left))):
                digest.update(block)
                left -= len(block)
            yield digest.hexdigest()


def _samples(path: str | os.PathLike[str]) -> str:
    """Digest of the first 64 KiB of each piece, and of the last 64 KiB."""
    size, digest = regular_size(path), _digest()
    with open_input(path) as stream:
        for start in [*range(0, size, _piece_size(size)), max(0, size - SAMPLE)]:
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def sample_digest(path: str | os.PathLike[str]) -> str:
    """Identifies a file without a sidecar: a digest of its length and of samples from all over it, which takes no
    longer for a larger file."""
    return _samples(path) + f"-{regular_size(path)}"


def check_content(path: str, content: Any, whole: bool = False, remedy: str | None = None) -> None:
    """BadFile when a file differs from its digests `content` (None: there are none). Every byte is compared when the
    file is small or `whole` is given, else samples."""
    if not isinstance(content, dict) or "samples" not in content:
        return
    size = regular_size(path)
    same = size == content.get("bytes")
    if same and (whole or size <= WHOLE) and "pieces" in content:
        same = list(_pieces(path)) == content["pieces"]
    elif same:
        same = _samples(path) == content["samples"]
    if not same:
        found, expected = "bytes that differ from those that were written", "the content that its sidecar describes"
        refuse(BadFile(path, found, expected, remedy or f"run fairseq-doctor verify {path}"))


def verify(path: str, content: Any) -> str | None:
    """A sentence about what is wrong with a file, None when every byte is as described."""
    if not isinstance(content, dict) or not isinstance(content.get("pieces"), list):
        return f"{path}: its sidecar has no digests, so nothing can be verified"
    try:
        size = regular_size(path)
    except UserError as error:
        return str(error)
    if size != content.get("bytes"):
        return f"{path}: has {size} bytes where {content.get('bytes')} were written"
    step = _piece_size(size)
    for number, (found, expected) in enumerate(itertools.zip_longest(_pieces(path), content["pieces"])):
        if found != expected:
            return f"{path}: bytes {number * step} to {min(size, (number + 1) * step)} differ from those written"
    return None


def check_opened(
    artefact: str, files: dict[str, str], whole: bool = False, expected: bool = False, remedy: str | None = None
) -> None:
    """Compares an artefact's files (name in the sidecar -> path) with its sidecar, if it has one. whole: compare every
    byte, because all are read anyway; expected: artefacts of this kind have digests, so warn when this one has none."""
    content = peek_sidecar(artefact).get("content")
    if not isinstance(content, dict):
        if expected:
            said = "%s: its description has no digests, so that damage would go unnoticed; make it again"
            logger.warning(said, artefact)
        return
    for name, file in files.items():
        if os.path.exists(file):  # a missing file is reported where it is opened
            check_content(file, content.get(name), whole, remedy)
