"""Reading files of `torch.save` in both containers, by allow-list. A zip container has a CRC of each part, which torch
does not check; here a part with a wrong CRC is refused. The older container has no CRCs; all that can be checked is
that it ends where its last tensor ends.

With `mmap`, tensors stay in the file until they are used, and their CRCs are compared then: `StorageCheck`."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from fairseq.errors import BadFile
from fairseq.files import safe_pickle
from fairseq.files.inputs import open_input, regular_size
from fairseq.files.names import is_utf8
from fairseq.refusals import refuse

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
CHUNK = 1 << 20
SHORTEST_TENSOR = 1 << 14  # bytes of a part that is compared at once even if the file is mapped
DAMAGED = (  # what zipfile raises for a damaged container or part
    zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, OSError, struct.error, zlib.error,
)


def read_torch_file(path: str | os.PathLike[str], expected: str, mmap: bool = False) -> Any:
    """Reads a file of `torch.save`, by the allow-list of `fairseq.files.safe_pickle`; `expected` is used in errors.

    With `mmap` the tensors of a zip container are memory-mapped. This is cheap for a caller that needs only some of
    them (and passes these to a `StorageCheck`), but the process may crash if the file is overwritten while they are in
    use."""
    path = os.fspath(path)
    with safe_pickle.pickle_errors(path, expected):
        if not is_zip(path, expected):
            return _read_legacy(path, expected)
        records = zip_records(path, expected)
        mmap = mmap and can_be_mapped(path, expected)
        check_zip(path, expected, whole=not mmap)
        with contextlib.ExitStack() as stack:
            return torch.load(
                path if is_utf8(path) else stack.enter_context(open_input(path)),
                map_location="cpu",
                mmap=mmap,
                weights_only=False,  # torch's own list cannot be extended by aliases and stubs; ours is as strict
                pickle_module=safe_pickle.pickle_module_for(path, {key: size for key, (size, _) in records.items()}),
            )


def is_zip(path: str, expected: str) -> bool:
    """Whether a file is a zip container (PyTorch 1.6 and later) or a legacy one; BadFile when neither."""
    with open_input(path) as stream:
        magic = stream.read(len(LEGACY_MAGIC))
    if magic.startswith(ZIP_MAGIC):
        return True
    if magic != LEGACY_MAGIC:
        raise BadFile(path, "a file that torch.save did not write", expected, "check the path")
    return False


def _read_legacy(path: str, expected: str) -> Any:
    with open_input(path) as stream:
        content = torch.load(
            stream, map_location="cpu", weights_only=False, pickle_module=safe_pickle.pickle_module_for(path)
        )
        rest = regular_size(path) - stream.tell()
    if rest:
        raise BadFile(path, f"{rest} bytes after its last tensor", expected, "copy or make the file again")
    return content


def zip_records(path: str, expected: str) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each tensor in a zip container, by its key. Containers with anything except tensors and plain
    data are refused: TorchScript archives are programs, and compressed or overlapping records can be larger than
    memory."""
    with _archive(path, expected) as archive:
        records = archive.infolist()
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise safe_pickle.RefusedGlobal(path, "a TorchScript program")
    total = sum(record.file_size for record in records)
    if total > os.path.getsize(path) or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise BadFile(path, f"compressed or overlapping parts of {total} bytes", expected, "use what torch.save wrote")
    tensors = [record for record in records if "/data/" in record.filename]
    return {record.filename.split("/data/")[-1]: (record.file_size, record.CRC) for record in tensors}


def _archive(path: str, expected: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except DAMAGED as error:
        raise BadFile(path, "a damaged zip container", expected, "copy the file again, or use another one") from error


def can_be_mapped(path: str | os.PathLike[str], expected: str) -> bool:
    """Whether `read_torch_file` maps this file when asked to. Tensors of other files are in memory, and checked."""
    path = os.fspath(path)
    return is_utf8(path) and is_zip(path, expected) and not _foreign_byte_order(path, expected)


def _foreign_byte_order(path: str, expected: str) -> bool:
    """Whether the tensors were saved on a machine with the other byte order; torch swaps the bytes when it reads
    them."""
    with _archive(path, expected) as archive:
        records = [record for record in archive.infolist() if record.filename.endswith("/byteorder")]
        order = sys.byteorder.encode()
        return any(next(_chunks(path, archive, record, expected), b"") != order for record in records)


def _chunks(path: str, archive: zipfile.ZipFile, record: zipfile.ZipInfo, expected: str) -> Iterator[bytes]:
    """The bytes of a part, at most CHUNK at a time; BadFile where the container is damaged or the CRC is another."""
    try:
        with archive.open(record) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except DAMAGED:
        _refuse(path, record.filename, expected)


def check_zip(path: str, expected: str, whole: bool) -> None:
    """BadFile for a zip container with a part whose CRC differs from that in its directory. Unless `whole`, the larger
    tensors are not checked here, but by a `StorageCheck`."""
    with _archive(path, expected) as archive:
        for record in archive.infolist():
            if whole or "/data/" not in record.filename or record.file_size <= SHORTEST_TENSOR:
                for _ in _chunks(path, archive, record, expected):
                    pass


class StorageCheck:
    """To be called with tensors of a memory-mapped zip container: BadFile if their bytes do not match any of its
    parts."""

    def __init__(self, path: str, expected: str) -> None:
        self.path, self.expected = path, expected
        self._known = set(zip_records(path, expected).values())
        self._seen: set[int] = set()

    def __call__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._seen or storage.nbytes() <= SHORTEST_TENSOR:
            return
        self._seen.add(storage.data_ptr())
        content = torch.tensor([], dtype=torch.uint8).set_(storage)
        if (len(content), zlib.crc32(content.numpy().data)) not in self._known:
            _refuse(self.path, f"a tensor of {len(content)} bytes", self.expected)


def _refuse(path: str, part: str, expected: str) -> None:
    found = f"damaged content: {part} has bytes that its CRC does not fit"
    remedy = "copy the file again, or use an earlier checkpoint (or go on with --force, if it was saved without CRCs)"
    refuse(BadFile(path, found, expected, remedy))
