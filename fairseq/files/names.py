"""Names of files as libraries written in C++ take them: they need UTF-8. A name from the command line need not be that:
where the locale has another encoding (LC_ALL=C), Python keeps each byte that it cannot decode as a lone surrogate, and
its own functions find the file all the same."""

from __future__ import annotations

import os


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a library written in C++ can be given this name. Where not, give it an open file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
