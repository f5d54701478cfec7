"""Files of documents, read a unit at a time: some whole documents, or a piece of a very long one. A unit is found by
one process and its documents are decoded in another, so units are raw and small, and each says where the next begins:
from there an interrupted run goes on.

Kinds: a document a line; documents between separators; a whole file; a document for each JSON object of a `.jsonl`
file. `record_files.py` has `.parquet` files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from fairseq.errors import BadFile
from fairseq.files.inputs import open_input

UNIT = 1 << 20  # bytes of text that are encoded together
CONTEXT = 256  # bytes on both sides of a cut in a document, from which it is seen whether cutting there changes tokens
CUTS_TRIED = 16  # in each unit
BETWEEN_LINES = re.compile(rb"(?:(?<=[^\s])|(?<=[^\s]\r))\n(?=[^\s])")

SafeCut = Callable[[str, str], bool]  # (text before, text after) -> whether cutting there changes no token


@dataclass(frozen=True)
class Unit:
    """raw: bytes of a text, or (texts, names) that are decoded already. end: where the next unit begins; number: lines
    or rows before this unit, next_number after it. begins, ends: whether a document begins and ends with it, other than
    for a piece of one."""

    raw: Any
    end: int
    number: int = 0
    next_number: int = 0
    begins: bool = True
    ends: bool = True


@dataclass
class Documents:
    """The documents of a unit; names: one each (empty where the file has none), or None for a file without names;
    nameless: how many have an `id` that can be no name."""

    texts: list[str]
    names: list[str] | None = None
    nameless: int = 0


class DocumentFile:
    """A file of documents. kind: a word for it in the sidecar; size: its extent, in `unit`s."""

    kind = ""
    unit = "B"

    def __init__(self, path: str) -> None:
        self.path = path
        with open_input(path, "check --trainpref, --validpref and --testpref") as stream:
            self.size = os.fstat(stream.fileno()).st_size

    def units(self, start: int = 0, number: int = 0) -> Iterator[Unit]:
        """The units from position `start` on, before which there are `number` lines or rows."""
        raise NotImplementedError

    def documents(self, unit: Unit) -> Documents:
        """The documents of a unit, decoded; BadFile for what is no document."""
        raise NotImplementedError

    def _blocks(self, start: int, cut: Callable[[bytes, bool], int]) -> Iterator[tuple[bytes, int]]:
        """(bytes, their end) of consecutive parts of the file. cut(bytes read so far, whether they reach the file's
        end) -> how many of them make a part, 0 to read more."""
        with open_input(self.path) as stream:
            stream.seek(start)
            position, data = start, b""
            while position + len(data) < self.size or data:
                data += self._read(stream, min(max(UNIT, len(data)), self.size - position - len(data)))
                at_end = position + len(data) >= self.size
                length = len(data) if at_end and len(data) <= UNIT else cut(data, at_end)
                if not length and at_end:
                    length = len(data)
                if length:
                    position += length
                    yield data[:length], position
                    data = data[length:]

    def _read(self, stream: IO[bytes], count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise BadFile(self.path, "its end before its size", f"{self.size} bytes", "it changed while being read")
        return data

    def _text(self, data: bytes, start: int) -> str:
        """UTF-8 that begins at byte `start` of the file."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{data[error.start]:02x} at offset {start + error.start}, which is not UTF-8"
            remedy = "convert the file, for instance with iconv"
            raise BadFile(self.path, f"{found} ({error.reason})", "UTF-8 text", remedy) from None


class LineFile(DocumentFile):
    """Each line is a document, which ends at a line feed; with_end: together with its line end."""

    def __init__(self, path: str, with_end: bool = False) -> None:
        super().__init__(path)
        self.with_end = with_end
        self.kind = "line-with-end" if with_end else "line"

    def units(self, start: int = 0, number: int = 0) -> Iterator[Unit]:
        """Units of whole lines."""
        for data, end in self._blocks(start, lambda data, at_end: data.rfind(b"\n") + 1):
            lines = data.count(b"\n")
            yield Unit(data, end, number, number + lines)
            number += lines

    def lines(self, unit: Unit) -> list[str]:
        """The lines of a unit with their line ends."""
        text = self._text(unit.raw, unit.end - len(unit.raw))
        pieces = text.split("\n")
        last = pieces.pop()
        return [piece + "\n" for piece in pieces] + ([last] if last else [])

    def documents(self, unit: Unit) -> Documents:
        """Its lines."""
        lines = self.lines(unit)
        return Documents(lines if self.with_end else [line.removesuffix("\n").removesuffix("\r") for line in lines])


class SeparatedFile(DocumentFile):
    """Documents between separators: lines that hold nothing but the separator, or (anywhere) its text wherever it
    occurs. What follows the last separator is a document unless it is empty."""

    def __init__(self, path: str, separator: str, anywhere: bool = False) -> None:
        super().__init__(path)
        self.kind = "separated" if anywhere else "separated-by-line"
        text = re.escape(separator.encode())
        self._between = re.compile(text if anywhere else rb"(?:\A|(?<=\n))" + text + rb"(?:\r?\n|\r?\Z)")
        self._complete = re.compile(text if anywhere else rb"(?:\A|(?<=\n))" + text + rb"\r?\n")

    def units(self, start: int = 0, number: int = 0) -> Iterator[Unit]:
        """Units of whole documents, each with the separator after it; `number` counts separators."""
        for data, end in self._blocks(start, self._last_end):
            found = sum(1 for _ in self._between.finditer(data))
            yield Unit(data, end, number, number + found)
            number += found

    def _last_end(self, data: bytes, at_end: bool) -> int:
        end = 0
        for match in self._complete.finditer(data):
            end = match.end()
        return end

    def documents(self, unit: Unit) -> Documents:
        """What is between the separators."""
        start, pieces = unit.end - len(unit.raw), self._between.split(unit.raw)
        if not pieces[-1]:
            pieces.pop()
        if b"".join(pieces).isascii():
            return Documents([piece.decode() for piece in pieces])
        self._text(unit.raw, start)  # which names the place of what is no UTF-8
        return Documents([piece.decode() for piece in pieces])


class WholeFile(DocumentFile):
    """The whole file is one document. safe_cut: tells where it can be cut between two lines without another token; the
    file is read into memory where no such place is found (None: there is none)."""

    kind = "file"

    def __init__(self, path: str, safe_cut: SafeCut | None) -> None:
        super().__init__(path)
        self.safe_cut = safe_cut

    def units(self, start: int = 0, number: int = 0) -> Iterator[Unit]:
        """Pieces of the document."""
        for data, end in self._blocks(start, lambda data, at_end: self._cut(data)):
            yield Unit(data, end, begins=end == len(data), ends=end == self.size)

    def _cut(self, data: bytes) -> int:
        """The last place before the end of `data` where it can be cut, 0 where there is none."""
        if self.safe_cut is None:
            return 0
        tried, place = 0, len(data) - CONTEXT
        while tried < CUTS_TRIED and (place := data.rfind(b"\n", CONTEXT, max(CONTEXT, place))) >= 0:
            if BETWEEN_LINES.match(data, place):
                tried += 1
                before, after = data[place + 1 - CONTEXT : place + 1], data[place + 1 : place + 1 + CONTEXT]
                if self.safe_cut(before.decode(errors="ignore"), after.decode(errors="ignore")):
                    return place + 1
        return 0

    def documents(self, unit: Unit) -> Documents:
        """The piece."""
        return Documents([self._text(unit.raw, unit.end - len(unit.raw))])


class JsonLines(LineFile):
    """A JSON object a line, of which `text_field` is the document and `name_field` its name, a string or whole number
    (None: the field `id`, where there is one). Blank lines are no documents."""

    def __init__(self, path: str, text_field: str, name_field: str | None = None) -> None:
        super().__init__(path)
        self.kind, self.text_field, self.name_field = "jsonl", text_field, name_field

    def documents(self, unit: Unit) -> Documents:
        """The objects of its lines."""
        documents = Documents([], [])
        assert documents.names is not None
        for number, line in enumerate(self.lines(unit), start=unit.number + 1):
            if number == 1:
                line = line.removeprefix("\ufeff")  # a byte order mark is none of JSON's characters
            if line.strip():
                record = self._record(line, number)
                documents.texts.append(self._field(record, self.text_field, number, "--text-field", str))
                documents.names.append(self._name(record, number))
                documents.nameless += not documents.names[-1] and record.get("id") not in (None, "")
        return documents

    def _where(self, number: int) -> str:
        return f"{self.path} line {number}"

    def _record(self, line: str, number: int) -> dict[str, Any]:
        expected = "one JSON object a line"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"what is no JSON ({str(error)[:100]})"
            raise BadFile(self._where(number), found, expected, "correct or remove the line") from None
        if not isinstance(record, dict):
            raise BadFile(self._where(number), f"a JSON {_kind_of(record)}", expected, "correct or remove the line")
        return record

    def _field(self, record: dict[str, Any], field: str, number: int, flag: str, *types: type) -> Any:
        if field not in record:
            fields = ", ".join(list(record)[:8]) or "none"
            found, remedy = f"no field {field!r} (its fields: {fields})", f"name another by {flag}"
            raise BadFile(self._where(number), found, f"the field of {flag} in every object", remedy)
        value = record[field]
        if type(value) not in types:
            found = f"{field!r} that is a JSON {_kind_of(value)}"
            raise BadFile(self._where(number), found, "a string" if len(types) == 1 else "a string or whole number",
                          f"name another field by {flag}")
        if isinstance(value, str) and not _is_unicode(value):
            found = f"half of a surrogate pair in {field!r}, which is no character"
            raise BadFile(self._where(number), found, "Unicode text", "correct or remove the line")
        return value

    def _name(self, record: dict[str, Any], number: int) -> str:
        if self.name_field is not None:
            return str(self._field(record, self.name_field, number, "--name-field", str, int))
        value = record.get("id", "")
        return str(value) if type(value) in (str, int) and _is_unicode(str(value)) else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
