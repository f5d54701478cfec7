"""Whether the files of an artefact still have the bytes that were written. A sidecar's `content` holds, for each file,
up to 64 digests of consecutive pieces, and one of 64 samples of 64 KiB. Opening compares every byte of a file up to
64 MiB, and of one that is read whole anyway; of a larger one the samples, so that it stays cheap. For the rest there is
`fairseq-doctor verify`, which reads everything and says where a byte is wrong."""

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
WHOLE = 64 << 20  # bytes up to which a file is compared whole when it is opened
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
    """By what a file without a sidecar is known: a digest of its length and of samples from all over it, which takes
    no longer for a larger file."""
    return _samples(path) + f"-{regular_size(path)}"


def check_content(path: str, content: Any, whole: bool = False, remedy: str | None = None) -> None:
    """Refuses a file that is not the one described by `content` (None: nothing is known): every byte of it when it is
    small or `whole`, else samples."""
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
    """Compares an artefact's files (name in the sidecar -> path) with its sidecar, if it has one. `whole`: every byte,
    since they are all read anyway. `expected`: artefacts of this kind have digests, so that a warning says it when one
    does not."""
    content = peek_sidecar(artefact).get("content")
    if not isinstance(content, dict):
        if expected:
            said = "%s: its description has no digests, so that damage would go unnoticed; make it again"
            logger.warning(said, artefact)
        return
    for name, file in files.items():
        if os.path.exists(file):  # who opens a missing one says so
            check_content(file, content.get(name), whole, remedy)
