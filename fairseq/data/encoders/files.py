"""Reading the files of encoders (models, codes, vocabularies), completely and with a limit on their size, before they
are passed to a library: missing, empty, wrong or damaged files give an error of one sentence. Libraries written in C++
get bytes or parsed content and never a path, so that any file name works."""

from __future__ import annotations

import codecs
import importlib
import json
from typing import Any

from fairseq.errors import BadFile, BadFlag, MissingDependency
from fairseq.files.inputs import open_input

LARGEST = 64 << 20  # bytes; published models and codes have at most about 15 MB


def optional_module(name: str, flag: str, package: str) -> Any:
    """Imports a library that only `flag` needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(name, flag, f"pip install {package}") from error


def read_bytes(path: str | None, flag: str, what: str) -> bytes:
    """The content of the file that `flag` names and that should be `what` ("a SentencePiece model")."""
    if not path:
        raise BadFlag(flag, "nothing", f"the path of {what}")
    with open_input(path, f"give {what} with {flag}") as stream:
        content = stream.read(LARGEST + 1)
    if not content:
        raise BadFile(path, "an empty file", what, f"give it with {flag}")
    if len(content) > LARGEST:
        raise BadFile(path, f"more than {LARGEST} bytes", what, f"give it with {flag}")
    return content


def read_utf8(path: str | None, flag: str, what: str) -> str:
    """The same for a text file in UTF-8. A byte order mark and NUL bytes are refused: either would change a symbol."""
    content = read_bytes(path, flag, what)
    assert path is not None
    if content.startswith(codecs.BOM_UTF8):
        raise BadFile(path, "a byte order mark at its beginning", f"{what} without one", "save it as plain UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}, which is not UTF-8"
        raise BadFile(path, found, what, f"give it with {flag}") from None
    if "\0" in text:
        raise BadFile(path, f"a NUL byte at offset {content.index(0)}", what, f"give it with {flag}")
    return text


def read_json_object(path: str | None, flag: str, what: str) -> dict[str, Any]:
    """The same for a JSON file that holds one object."""
    text = read_utf8(path, flag, what)
    assert path is not None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"text that is not JSON ({str(error)[:80]})", what, f"give it with {flag}") from None
    if not isinstance(content, dict):
        raise BadFile(path, f"a JSON {type(content).__name__}", what, f"give it with {flag}")
    return content
