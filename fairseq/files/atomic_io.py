"""Files that are either whole or absent: written under a temporary name in the same folder, flushed to the disk,
renamed. Everything the programs produce goes through here, so that a kill, a full disk or a second run never leaves
half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fairseq.errors import BadFile, UserError
from fairseq.files.inputs import open_input
from fairseq.refusals import refuse
from fairseq.sizes import size_text


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """The name under which `path` is written before it is whole; the same on every run, so leftovers are
    overwritten."""
    path = Path(path)
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Opens the temporary file of `path`, for `publish` to rename; it is removed when an exception leaves.

    UserError naming `path` when the disk is full, or whatever else keeps it from being written."""
    temporary = temporary_path(path)
    make_parent(path)
    if "b" not in mode and encoding is None:
        encoding = "utf-8"
    try:
        with writing(path), open(temporary, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """As `staged`; on leaving without an exception the file replaces `path`."""
    with staged(path, mode, encoding) as stream:
        yield stream
    try:
        with writing(path):
            os.replace(temporary_path(path), path)
    except UserError:
        temporary_path(path).unlink(missing_ok=True)
        raise


def is_full(error: OSError) -> bool:
    """Whether the system has no room: a full disk, a quota, or a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says when `path` cannot be written into one sentence about it. (An error about another,
    named file passes: that is its reader's business.)"""
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


@contextlib.contextmanager
def torch_writing() -> Iterator[None]:
    """For `torch.save` into a stream: it hides what the system said, and raises something of its own."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(None, f"torch.save: {str(error).splitlines()[0][-120:]}") from error


def sync(path: str | os.PathLike[str]) -> None:
    """Makes sure that the bytes of a file that another library wrote are on the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Renames a file that another library wrote, after making sure that its bytes are on the disk."""
    sync(temporary)
    os.replace(temporary, path)


_created: list[Path] = []


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Creates a folder, and those above it."""
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot create this folder ({error.strerror}); choose a writable place") from error
    _created.extend(reversed(missing))


def make_parent(path: str | os.PathLike[str]) -> None:
    """Creates the folder that `path` goes into."""
    make_folder(Path(path).parent)


def forget_folders() -> None:
    """The folders created so far are here to stay."""
    _created.clear()


def remove_empty_folders() -> None:
    """Removes what `make_folder` created and nothing was written to: for a command that fails."""
    while _created:
        with contextlib.suppress(OSError):
            _created.pop().rmdir()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as indented JSON with sorted keys, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.write("\n")


def read_json(path: str | os.PathLike[str], limit: int = 16 << 20) -> Any:
    """Reads a JSON file of at most `limit` bytes."""
    with open_input(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        text = stream.read(min(size, limit))
    if size > limit:
        raise BadFile(path, f"{size} bytes", f"a JSON file of at most {limit} bytes")
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
