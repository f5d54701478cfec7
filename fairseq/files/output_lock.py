"""Locks on outputs, so that only one process writes an output. While a process writes `OUTPUT` (a file, the common
beginning of several names, or a name in a folder), it has an exclusive `flock` on `OUTPUT.lock`, which contains its
process id and host; a second writer is refused with a sentence that names these. The operating system releases the lock
when the process ends in any way, so the lock file of a killed process has no effect: the next writer locks it, and
removes it at the end.

The lock file is unlinked while it is locked. A process that has locked a file therefore checks that the file still has
its name; otherwise two processes could have locked two different files of the same name. Forked children close the
descriptor at once, so that a worker that outlives its parent has no lock. On NFS, Linux implements `flock` as a lock on
the server, which is valid for all machines; where a mount option or the file system prevents that, a warning says
so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairseq.errors import BadFile, UserError
from fairseq.files.folders import make_parent

logger = logging.getLogger(__name__)

SUFFIX = ".lock"
LONGEST = 512  # bytes read of a lock file
UNAVAILABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "nobrl", "localflock"}  # of NFS, CIFS and Lustre
MOUNTS = "/proc/self/mountinfo"


class OutputInUse(UserError):
    """Another process is writing the output."""

    def __init__(self, output: str | os.PathLike[str], owner: str, lock: Path) -> None:
        self.output, self.owner, self.lock = os.fspath(output), owner, lock
        super().__init__(
            f"{self.output}: {owner} is writing it and holds {lock}, expected no other writer; wait for its end, or "
            "choose another name"
        )


@dataclass
class _Lock:
    path: Path  # absolute, without links
    descriptor: int
    thread: int
    depth: int = 1


_locks: dict[tuple[int, int], _Lock] = {}  # by device and inode of the lock file
_guard = threading.Lock()
_warned: set[str] = set()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()
    for lock in _locks.values():
        with contextlib.suppress(OSError):
            os.close(lock.descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def lock_path(output: str | os.PathLike[str]) -> Path:
    """The lock file of an output."""
    return Path(os.fspath(output) + SUFFIX)


def holds_lock_for(path: str | os.PathLike[str]) -> bool:
    """Whether this process has locked an output in the folder of `path`, or in a folder above it."""
    folders = Path(os.path.realpath(path)).parents
    return any(lock.path.parent in folders for lock in list(_locks.values()))


@contextlib.contextmanager
def exclusive(*outputs: str | os.PathLike[str] | None) -> Iterator[None]:
    """Locks `outputs` (None: nothing) during the `with` block; the same thread may lock an output repeatedly.
    OutputInUse when another process, or another thread, has locked one."""
    with contextlib.ExitStack() as stack:
        for output in outputs:
            if output is not None:
                stack.enter_context(_locked(output))
        yield


def release_all() -> None:
    """Releases all locks of this process; called when a command ends, also after errors."""
    with _guard:
        for key, lock in list(_locks.items()):
            lock.depth = 1
            _release(key)


@contextlib.contextmanager
def _locked(output: str | os.PathLike[str]) -> Iterator[None]:
    path = lock_path(output)
    make_parent(path)
    with _guard:
        key = _acquire(output, path)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # a forked child has given it up already
            with _guard:
                if key in _locks:  # not all were released
                    _release(key)


def _acquire(output: str | os.PathLike[str], path: Path) -> tuple[int, int]:
    while True:
        descriptor = _open(path)
        key = _identity(descriptor)
        if key in _locks:
            os.close(descriptor)
            if _locks[key].thread != threading.get_ident():
                raise OutputInUse(output, "another thread of this process", path)
            _locks[key].depth += 1
            return key
        try:
            if _lock(output, path, descriptor):
                _locks[key] = _Lock(Path(os.path.realpath(path)), descriptor, threading.get_ident())
                return key
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it meanwhile


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise UserError(
            f"{path}: this lock file cannot be written ({error.strerror}); choose a writable place for the output"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFile(path, "no regular file", "a lock file or nothing", "choose another name")
        text = os.pread(descriptor, LONGEST, 0)
        if text and not text.startswith(b"process "):
            raise BadFile(path, "a file that is not a lock file", "a lock file or nothing", "choose another name")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(output: str | os.PathLike[str], path: Path, descriptor: int) -> bool:
    """Locks an open lock file and writes the owner into it; False when the file has been unlinked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        if _has_name(path, descriptor):
            raise OutputInUse(output, owner, path) from None
        return False
    except OSError as error:
        if error.errno not in UNAVAILABLE:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose another place") from error
        _warn(path, f"the file system gives no locks ({error.strerror})")
    else:
        _warn_of_local_locks(path)
    if not _has_name(path, descriptor):
        return False
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space and run this again") from error
    return True


def _owner(descriptor: int) -> str:
    """The owner that is written in the lock file; a text without details when it has not been written yet."""
    for _ in range(20):
        text = os.pread(descriptor, LONGEST, 0).decode(errors="replace")
        if text.endswith("\n"):
            return " ".join(text.split())
        time.sleep(0.02)
    return "another process"


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _has_name(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the name of the open file. It is opened, not only looked up, because NFS asks the server
    only on opening."""
    try:
        again = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _identity(again) == _identity(descriptor)
    finally:
        os.close(again)


def _release(key: tuple[int, int]) -> None:
    lock = _locks[key]
    lock.depth -= 1
    if lock.depth:
        return
    del _locks[key]
    try:
        if _has_name(lock.path, lock.descriptor):
            with contextlib.suppress(OSError):
                os.unlink(lock.path)
    finally:
        os.close(lock.descriptor)


def _warn_of_local_locks(path: Path) -> None:
    """Warns where a mount option makes locks local to this machine, so that others do not see them."""
    try:
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as stream:
            mounts = [line.split() for line in stream]
    except OSError:
        return
    folder = os.path.realpath(path.parent)
    best, found = -1, set()
    for fields in mounts:
        point = fields[4].encode().decode("unicode_escape") if "\\" in fields[4] else fields[4]
        if len(point) > best and (folder + "/").startswith(point.rstrip("/") + "/"):
            best, found = len(point), {*fields[5].split(","), *fields[-1].split(",")}
    local = found & LOCAL_OPTIONS
    if local:
        _warn(path, f"it is mounted with {sorted(local)[0]}, so other machines do not see locks")


def _warn(path: Path, why: str) -> None:
    folder = str(path.parent)
    if folder not in _warned:
        _warned.add(folder)
        logger.warning(
            "%s: %s; make sure yourself that no two processes write the same output here", folder, why
        )
