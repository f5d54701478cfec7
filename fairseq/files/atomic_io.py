"""Atomic writing: a file is written to a temporary name in the same folder, flushed to disk, and renamed. All output of
the programs is written by these functions, so that a kill, a full disk or a second run never leaves an incomplete file.

Temporary names are unique to a process (`NAME.<process id>-<random>.tmp`). The files are always newly created, never
opened through a link. If a killed process has left a temporary file that can be continued, it is adopted, that is,
renamed to this process's temporary name. Both are done only while the output is locked (`output_lock`), so that no
other process writes it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fairseq.errors import BadFile, UserError
from fairseq.files.folders import make_parent
from fairseq.files.inputs import open_input
from fairseq.files.output_lock import holds_lock_for
from fairseq.refusals import refuse
from fairseq.sizes import size_text

LONGEST_NAME = 255 - 60  # bytes that file systems allow, minus those that temporary names and endings add
PROCESS = r"[0-9]+-[0-9a-f]{8}"
_process: list[str] = []
_LEFTOVER = re.compile(PROCESS + r"\.tmp")

os.register_at_fork(after_in_child=_process.clear)


def process_name() -> str:
    """The part of a temporary name that is unique to this process, also among machines; of the form `PROCESS`."""
    if not _process:
        _process.append(f"{os.getpid()}-{secrets.token_hex(4)}")
    return _process[0]


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """The name under which this process writes `path` until it is complete."""
    path = Path(path)
    return path.with_name(f"{path.name}.{process_name()}.tmp")


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files of `path` that killed processes have left; none unless this process has locked the output."""
    path = Path(path)
    if not holds_lock_for(path) or not path.parent.is_dir():
        return []
    own, begin = temporary_path(path).name, path.name + "."
    names = (name for name in os.listdir(path.parent) if name.startswith(begin) and name != own)
    found = (path.with_name(name) for name in names if _LEFTOVER.fullmatch(name[len(begin) :]))
    return [leftover for leftover in found if stat.S_ISREG(os.lstat(leftover).st_mode)]


def take_over_temporary(path: str | os.PathLike[str]) -> bool:
    """Renames the temporary file of `path` that a killed process has left to this process's temporary name; returns
    whether this process has a temporary file now. If there are several, the right one is unknown, and all are
    removed."""
    own, left = temporary_path(path), leftovers(path)
    if len(left) == 1 and not own.exists():
        os.replace(left[0], own)
        return True
    discard(left)
    return own.exists()


def discard(paths: list[Path]) -> None:
    """Removes files, as far as they exist."""
    for path in paths:
        path.unlink(missing_ok=True)


def open_temporary(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> IO[Any]:
    """Creates and opens the temporary file of `path`; in the mode `r+b` opens the one that is there."""
    temporary = temporary_path(path)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if mode != "r+b":
        discard([temporary, *leftovers(path)])
        flags |= os.O_CREAT | os.O_EXCL
    with writing(path):
        return open(os.open(temporary, flags, 0o666), mode, encoding=encoding)


def open_log(path: str | os.PathLike[str]) -> IO[str]:
    """Opens a text file for appending, and creates it if necessary; refuses links, devices and pipes."""
    make_parent(path)
    require_replaceable(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with writing(path):
        return open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Opens the temporary file of `path`, which `publish` renames later; it is removed after an exception.

    UserError naming `path` when it cannot be written, for example because the disk is full."""
    make_parent(path)
    require_replaceable(path)
    if "b" not in mode and encoding is None:
        encoding = "utf-8"
    try:
        with writing(path), open_temporary(path, mode, encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary_path(path).unlink()
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """As `staged`; on leaving without an exception the file replaces `path`."""
    with staged(path, mode, encoding) as stream:
        yield stream
    try:
        with writing(path):
            require_replaceable(path)
            os.replace(temporary_path(path), path)
    except UserError:
        temporary_path(path).unlink(missing_ok=True)
        raise


def name_problem(name: str, folder: bool = False) -> str | None:
    """What is wrong with the name of an output; None when a file (or a `folder`) can have it."""
    if not name or (not folder and not os.path.basename(name)):
        return f"the empty name {name!r}" if not name else f"{name}, which ends in a slash"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"{ascii(name)}, which is not UTF-8"
    longest = max(len(part) for part in os.fsencode(name).split(b"/"))
    return f"a name of {longest} bytes, {longest - LONGEST_NAME} too long" if longest > LONGEST_NAME else None


def kind_of_node(path: str | os.PathLike[str]) -> str | None:
    """The kind of `path`, if it is not a regular file: "a symbolic link", "a folder", ...; None for a regular file, or
    when nothing has this name. Links are not followed."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISREG(mode):
        return None
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """BadFile when something other than a regular file has the name `path`: only regular files are replaced."""
    kind = kind_of_node(path)
    if kind is not None:
        raise BadFile(path, kind, "a regular file or nothing", "choose another name, or remove it yourself")


def is_full(error: OSError) -> bool:
    """Whether the error is a full disk, a quota, or a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns OSErrors while `path` is written into a UserError about `path`. (An error about another, named file is not
    changed; it is handled where that file is read.)"""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) != os.fspath(temporary_path(path)):
            raise
        remedy = "free some space" if is_full(error) or error.errno is None else "choose a writable place"
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{os.fspath(path)}: cannot be written ({reason}); what was there before is untouched; {remedy} and run "
            "the same command again"
        ) from error


class _ErrorRecorder:
    """A stream for a library that hides the OSError when writing fails: the error is stored here."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """As the stream's."""
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """As the stream's."""
        self.stream.flush()


@contextlib.contextmanager
def torch_writing(stream: IO[bytes]) -> Iterator[Any]:
    """A stream for `torch.save` into `stream`; if writing fails, the OSError is raised instead of torch's error."""
    recorder = _ErrorRecorder(stream)
    try:
        yield recorder
    except RuntimeError as error:
        raise recorder.error or OSError(None, "torch could not store it") from error


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file that another library has written to disk."""
    with writing(path), open(path, "rb") as stream:
        os.fsync(stream.fileno())


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Flushes a temporary file to disk and renames it to `path`."""
    with writing(path):
        sync(temporary)
        require_replaceable(path)
        os.replace(temporary, path)


@contextlib.contextmanager
def delay_interrupts() -> Iterator[None]:
    """Delays Ctrl-C while files that belong together are renamed, so that none of them is missing afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as indented JSON with sorted keys, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.write("\n")


def read_json(path: str | os.PathLike[str], limit: int = 16 << 20) -> Any:
    """Reads a JSON file of at most `limit` bytes."""
    with open_input(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise BadFile(path, f"{size} bytes", f"a JSON file of at most {limit} bytes")
        text = stream.read(size)
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:  # numbers of too many digits, too deep
        reason = str(error) or type(error).__name__
        found, remedy = f"text that is not JSON ({reason})", "delete it and make it again"
        raise BadFile(path, found, "a JSON file", remedy) from error


def require_free_space(path: str | os.PathLike[str], needed: int, what: str) -> None:
    """Refuses a job whose `needed` bytes do not fit on the disk that holds `path`."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        refuse(
            UserError(
                f"{what} needs {size_text(needed)} in {folder}, which has {size_text(free)} free; "
                "free some space, choose another place, or go on with --force"
            )
        )
