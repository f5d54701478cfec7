"""Exceptions for users' mistakes. The message of each is one sentence that says where the mistake is, what was found,
what was expected and what to do. The commands print that sentence and exit with status 2 (see `fairseq_cli.entry`)."""

from __future__ import annotations

import os
import stat

NODES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA out of memory",
    "bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory or threads could not be allocated; Python, torch and FAISS raise different
    ones."""
    said = str(error)
    return isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY)


class UserError(ValueError):
    """A mistake in a flag, a file or the environment, described in one sentence."""


class BadFile(UserError):
    """A file whose content cannot be used."""

    def __init__(self, file: str | os.PathLike[str], found: str, expected: str, remedy: str = "") -> None:
        self.file, self.found, self.expected, self.remedy = os.fspath(file), found, expected, remedy
        super().__init__(f"{self.file}: found {found}, expected {expected}" + (f"; {remedy}" if remedy else ""))


def unreadable(
    file: str | os.PathLike[str], error: BaseException, found: str, expected: str, remedy: str
) -> UserError:
    """The error about a file whose reading ended in `error`: BadFile, unless memory did not suffice. A damaged file may
    ask for too much memory, and a good one may need more than there is."""
    if not is_out_of_memory(error):
        return BadFile(file, found, expected, remedy)
    return UserError(
        f"{os.fspath(file)}: using it needs more memory than this process may have (ulimit -v, a container's limit, "
        f"the machine's); raise the limit, or, if the file should not need that much, {remedy}"
    )


class BadFlag(UserError):
    """A command-line flag whose value cannot be used."""

    def __init__(self, flag: str, found: object, expected: str, remedy: str = "") -> None:
        self.flag, self.found, self.expected, self.remedy = flag, found, expected, remedy
        super().__init__(f"{flag}: found {found}, expected {expected}" + (f"; {remedy}" if remedy else ""))


class MissingFile(UserError, FileNotFoundError):
    """A file that should exist and does not, or is something else than a regular file."""

    def __init__(self, file: str | os.PathLike[str], remedy: str = "") -> None:
        self.file, self.remedy = os.fspath(file), remedy
        super().__init__(f"{self.file}: {_in_place_of_a_file(self.file)}" + (f"; {remedy}" if remedy else ""))


def _in_place_of_a_file(path: str) -> str:
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except PermissionError:
        return "in a folder that this user may not read"
    except (OSError, ValueError):
        return "a link to a file that does not exist" if os.path.islink(path) else "no such file"
    if kind == stat.S_IFREG:
        return "no such file"  # when it was looked for
    return f"{NODES.get(kind, 'something else')}, not a file"


class MissingDependency(UserError, ImportError):
    """An optional library that the requested feature needs."""

    def __init__(self, module: str, feature: str, install: str) -> None:
        self.module, self.feature, self.install = module, feature, install
        super().__init__(f"{feature} needs the Python module {module}, which is not installed; run: {install}")
