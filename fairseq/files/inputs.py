"""Opening files for reading, regular files only. Reading a FIFO may wait for ever, a device may never end, and neither
has a length with which sizes could be compared; so the kind of a file is checked before it is opened."""

from __future__ import annotations

import os
import stat
from typing import IO

from fairseq.errors import NODES, BadFile, MissingFile


def regular_size(path: str | os.PathLike[str], remedy: str = "") -> int:
    """Size of a regular file in bytes; MissingFile when it does not exist or is a folder, BadFile for a FIFO, socket or
    device."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(path, remedy) from error
    if stat.S_ISDIR(status.st_mode):
        raise MissingFile(path, remedy)
    _require_regular(path, status)
    return status.st_size


def open_input(path: str | os.PathLike[str], remedy: str = "") -> IO[bytes]:
    """Opens a regular file for reading bytes, without ever waiting; errors as `regular_size`."""
    regular_size(path, remedy)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(path, os.fstat(descriptor))  # the file may have been replaced since it was checked
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        remedy = "write what it gives to a file, and name that" if kind == stat.S_IFIFO else "check the path"
        raise BadFile(path, NODES.get(kind, "something else than a file"), "a regular file", remedy)
