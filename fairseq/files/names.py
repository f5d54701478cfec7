"""File names for libraries written in C++, which need UTF-8. A name from the command line may have another encoding:
where the locale is not UTF-8 (LC_ALL=C), Python represents each byte that it cannot decode by a lone surrogate, and
Python's own functions find the file."""

from __future__ import annotations

import os


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether this name can be passed to a library written in C++. If not, pass an open file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
