"""`.parquet` files of documents: a column of texts, and one of names if there is one. Needs pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from fairseq.data.document_files import UNIT, DocumentFile, Documents, Unit
from fairseq.errors import BadFile, MissingDependency

ROWS = 128  # read at a time
EXTRA = "pip install -c constraints.txt --editable '.[parquet]'"


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingDependency("pyarrow", "a .parquet file of documents", EXTRA) from None


class ParquetFile(DocumentFile):
    """A row is a document: its text is in the column `text_field`, its name in `name_field` (None: the column `id`,
    where there is one). Positions are rows."""

    kind = "parquet"
    unit = "row"

    def __init__(self, path: str, text_field: str, name_field: str | None = None) -> None:
        super().__init__(path)
        self._bytes = self.size
        file = self._open()
        self.size = file.metadata.num_rows
        columns = file.schema_arrow.names
        types = importlib.import_module("pyarrow").types
        self.text_field, self.name_field = text_field, name_field
        if name_field is None and "id" in columns and self._is_name(types, file.schema_arrow.field("id").type):
            self.name_field = "id"
        for flag, column in (("--text-field", text_field), ("--name-field", self.name_field)):
            if column is None:
                continue
            if columns.count(column) != 1:
                found = f"no column {column!r} (its columns: {', '.join(columns[:8]) or 'none'})"
                raise BadFile(path, found, f"the column of {flag}", f"name another by {flag}")
            kind = file.schema_arrow.field(column).type
            if not (self._is_text(types, kind) if flag == "--text-field" else self._is_name(types, kind)):
                found, expected = f"the column {column!r} of type {kind}", "one of strings"
                raise BadFile(path, found, expected, f"name another by {flag}")

    @staticmethod
    def _is_text(types: Any, kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))

    def _is_name(self, types: Any, kind: Any) -> bool:
        return self._is_text(types, kind) or bool(types.is_integer(kind))

    def _open(self) -> Any:
        library = _parquet()
        try:
            return library.ParquetFile(self.path)
        except (OSError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:120]
            found, remedy = f"{self._bytes} bytes that are no parquet file ({said})", "copy it again"
            raise BadFile(self.path, found, "a .parquet file", remedy) from None

    def units(self, start: int = 0, number: int = 0) -> Iterator[Unit]:
        """Units of rows from row `start` on."""
        file = self._open()
        groups: list[int] = []
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if groups or first + rows > start:
                groups.append(group)
            else:
                first += rows
        columns = [self.text_field] + ([self.name_field] if self.name_field is not None else [])
        texts: list[str] = []
        names: list[str] = []
        row, size = first, 0
        for batch in self._batches(file, groups, columns):
            values = batch.column(self.text_field).to_pylist()
            named = [""] * len(values) if self.name_field is None else batch.column(self.name_field).to_pylist()
            for text, name in zip(values, named):
                row += 1
                if row <= start:
                    continue
                if text is None:
                    raise BadFile(f"{self.path} row {row}", f"no {self.text_field!r} (null)", "a string",
                                  "remove the row")
                texts.append(text)
                names.append("" if name is None else str(name))
                size += len(text)
                if size >= UNIT:
                    yield Unit((texts, names), row, row - len(texts), row)
                    texts, names, size = [], [], 0
        if texts:
            yield Unit((texts, names), row, row - len(texts), row)

    def _batches(self, file: Any, groups: list[int], columns: list[str]) -> Iterator[Any]:
        try:
            yield from file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns)
        except (OSError, ValueError) as error:  # pages that are damaged, or text that is no UTF-8
            said = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise BadFile(self.path, f"rows that cannot be read ({said})", "a whole file", "copy it again") from None

    def documents(self, unit: Unit) -> Documents:
        """Its rows."""
        return Documents(*unit.raw)
