"""Reading NumPy's files without trusting them: a header is checked before memory is allocated or mapped, it must
describe exactly the bytes that follow it, and only arrays of plain numbers are read (no objects, which would be
unpickled).

Also here: archives with a digest, that is, `.npz` files that contain a digest of all arrays and the identity of the job
that they belong to. They store the state from which a later run continues. A sidecar would not do for this, because
after a kill it could describe an earlier version of the file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFile, UserError, unreadable
from fairseq.files.atomic_io import atomic_write
from fairseq.files.inputs import open_input

PLAIN_KINDS = "biufU"
LONGEST_ARCHIVE_LIST = 64  # arrays of an archive with a digest
UNREADABLE: tuple[type[Exception], ...] = (ValueError, KeyError, EOFError, MemoryError, RuntimeError, OverflowError)
UNREADABLE += (TypeError, SyntaxError, RecursionError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
UNREADABLE += (NotImplementedError, struct.error, OSError)  # what NumPy, the zip module and Python's parser may raise


def map_array(path: str, remedy: str = "make it again") -> NDArray[Any]:
    """Memory-maps a `.npy` file read-only; MissingFile, or BadFile unless it is a complete array of plain numbers."""
    with open_input(path, remedy) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            shape, fortran, dtype = _header(stream)
        except UNREADABLE as error:
            found = f"a file that cannot be opened ({_reason(error)})"
            raise unreadable(path, error, found, "a numpy array", remedy) from error
        start = stream.tell()
        announced = math.prod(shape) * dtype.itemsize
        if size - start != announced:
            found = f"{size - start} bytes of numbers"
            raise BadFile(path, found, f"the {announced} that its header announces", remedy)
        order: Any = "F" if fortran else "C"
        if announced == 0:
            return np.zeros(shape, dtype, order)
        return np.memmap(stream, dtype, "r", start, shape, order)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether the order is Fortran's, type) from the NumPy header at the position of `stream`; ValueError for
    types that are not read."""
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("a later version of the format, whose headers may be of any length")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in PLAIN_KINDS or dtype.hasobject:
        raise ValueError(f"elements of type {dtype.str}")
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"the shape {shape}")
    return shape, fortran, dtype


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Archives with a digest


def write_digested(path: str, identity: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes `arrays` by name, `identity` (plain values that identify the job), and a digest of all; atomically."""
    named = {name: np.asarray(array) for name, array in arrays.items()}
    named["identity"] = np.frombuffer(_text(identity).encode(), np.uint8)
    seal = np.frombuffer(_digest(named), np.uint8)
    with atomic_write(path) as stream:
        np.savez(stream, seal=seal, **named)  # type: ignore[arg-type, unused-ignore]


def read_digested(path: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    """(identity, arrays) as `write_digested` was given them, to the bit; MissingFile, or BadFile for anything else."""
    expected = "a whole file of this program's own"
    try:
        with open_input(path) as stream:
            arrays = _archive(stream)
        seal, identity = arrays.pop("seal"), arrays["identity"]
        if seal.tobytes() != _digest(arrays):
            raise BadFile(path, "bytes that differ from those that were written", expected, "delete it")
        del arrays["identity"]
        return json.loads(identity.tobytes()), arrays
    except UserError:
        raise
    except UNREADABLE as error:
        found = f"a file that cannot be read ({_reason(error)})"
        raise unreadable(path, error, found, expected, "delete it") from error


def same_identity(stored: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether an identity that was read is the one `wanted`."""
    return bool(stored == json.loads(_text(wanted)))


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _archive(stream: IO[bytes]) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz`, whose parts must be uncompressed and inside the file."""
    size = os.fstat(stream.fileno()).st_size
    arrays = {}
    with zipfile.ZipFile(stream) as archive:
        parts = archive.infolist()
        stored = all(part.compress_type == zipfile.ZIP_STORED and not part.flag_bits & 1 for part in parts)
        if not stored or len(parts) > LONGEST_ARCHIVE_LIST or sum(part.file_size for part in parts) > size:
            raise ValueError("compressed, encrypted or overlapping parts")
        for part in parts:
            content = archive.read(part)
            arrays[part.filename.removesuffix(".npy")] = _from_bytes(content)
    return arrays


def _from_bytes(content: bytes) -> NDArray[Any]:
    stream = io.BytesIO(content)
    shape, fortran, dtype = _header(stream)
    numbers = np.frombuffer(content, np.uint8, offset=stream.tell())
    if len(numbers) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(numbers)} bytes for the shape {shape}")
    return np.array(numbers).view(dtype).reshape(shape, order="F" if fortran else "C")
