"""Texts to a tokenizer's documents: every kind of file and of separator, with any number of processes, after kills, and
with whatever may be in a file; one sentence for what is no text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.data import document_files
from fairseq.data.document_files import LineFile, SeparatedFile
from fairseq.data.document_writer import DocumentWriter
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.text_description import text_counts

FILES = (".bin", ".idx", ".documents.npy", ".names.txt", ".json")


@pytest.fixture(scope="module")
def tokenizers(golden_hf: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(golden_hf / name) for name in ("gpt2", "llama")}


@pytest.fixture
def preprocess(run_cli: Callable[..., Any], golden_hf: Path, tmp_path: Path) -> Callable[..., Any]:
    """preprocess(text, *flags, model="gpt2", out="bin"): a finished run; its split is tmp_path / out / "train"."""

    def run(text: Path, *flags: Any, model: str = "gpt2", out: str = "bin") -> Any:
        common = ["--only-source", "--hf-tokenizer", golden_hf / model, "--trainpref", text, "--no-progress-bar"]
        return run_cli("preprocess", [*common, "--destdir", tmp_path / out, *flags])

    return run


def written(folder: Path) -> dict[str, bytes]:
    """The files of the split in a folder by their endings; nothing temporary may be among them."""
    found = {path.name.removeprefix("train"): path.read_bytes() for path in folder.glob("train*")}
    assert set(found) <= set(FILES), found.keys()
    return found


def documents(folder: Path) -> list[list[int]]:
    dataset = MMapIndexedDataset(str(folder / "train"))
    return [dataset[i].tolist() for i in range(len(dataset))]


def many(golden_hf: Path) -> list[str]:
    """Texts for files of documents, some empty, some long, with line ends of both kinds and other alphabets."""
    lines = (golden_hf / "text/wiki.valid.txt").read_text().splitlines(keepends=True)
    texts = ["".join(lines[i : i + n]) for i, n in ((0, 3), (3, 1), (4, 40), (44, 2))]
    return [*texts, "", "Ünïcode 北京 🙂 text", "a\r\nb\r\n", "x"] * 6


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": f"no\n{i}"}) + "\n" for i, text in enumerate(texts)))


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=5)


# file name -> (writer, flags, the documents that are meant)
KINDS: dict[str, tuple[Callable[[Path, list[str]], object], list[str], Callable[[list[str]], list[str]]]] = {
    "a.jsonl": (write_jsonl, [], lambda texts: texts),
    "a.parquet": (write_parquet, ["--name-field", "n"], lambda texts: texts),
    "line": (
        lambda path, texts: path.write_bytes("\n".join(texts).encode()),
        [],
        lambda texts: [line.removesuffix("\r") for line in "\n".join(texts).split("\n")],
    ),
    "line-with-end": (
        lambda path, texts: path.write_bytes("\n".join(texts).encode()),
        ["--hf-documents", "line-with-end"],
        lambda texts: re.findall(r"[^\n]*\n|[^\n]+\Z", "\n".join(texts)),
    ),
    "separated-by-line": (
        lambda path, texts: path.write_bytes("\n=== x\n".join(texts).encode()),
        ["--document-separator", "=== x"],
        lambda texts: [text + "\n" for text in texts[:-1]] + texts[-1:],
    ),
    "separated": (
        lambda path, texts: path.write_bytes("<<>>".join(texts).encode()),
        ["--document-separator", "<<>>", "--hf-documents", "separated"],
        lambda texts: texts,
    ),
    "file": (
        lambda path, texts: path.write_bytes("".join(texts).encode()),
        ["--hf-documents", "file"],
        lambda texts: ["".join(texts)],
    ),
}


@pytest.mark.parametrize("kind, model", [*((kind, "gpt2") for kind in KINDS), ("a.jsonl", "llama"), ("file", "llama")])
def test_documents_are_what_the_tokenizer_makes_of_each(
    kind: str, model: str, golden_hf: Path, preprocess: Any, tmp_path: Path, tokenizers: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same for units far smaller and far larger than documents, and for any number of processes."""
    write, flags, meant = KINDS[kind]
    texts = many(golden_hf)
    write(tmp_path / kind, texts)
    folders = {}
    for unit, workers in ((700, 1), (1 << 20, 2), (700, 3)):
        monkeypatch.setattr(document_files, "UNIT", unit)
        monkeypatch.setattr("fairseq.data.parquet_files.UNIT", unit)
        out = f"{unit}-{workers}"
        done = preprocess(tmp_path / kind, *flags, "--workers", workers, model=model, out=out)
        assert done.status == 0, done.stderr
        folders[out] = written(tmp_path / out)
    first = folders["700-1"]
    assert all(found == first for found in folders.values())
    eos = tokenizers[model].eos_token_id
    expected = [[*ids, eos] for ids in tokenizers[model](meant(texts))["input_ids"]]
    assert documents(tmp_path / "700-1") == expected
    counts = text_counts(str(tmp_path / "700-1/train"))
    assert counts is not None
    table = np.load(tmp_path / "700-1/train.documents.npy")
    whole = meant(texts)
    assert table[:, 0].tolist() == [0, *np.cumsum([len(ids) for ids in expected])[:-1]]
    assert table[:, 1].tolist() == [len(text.encode()) for text in whole]
    assert table[:, 2].tolist() == [len(text.split()) for text in whole]
    assert table[:, 3].tolist() == [len(re.split(r"\s+", text)) for text in whole]
    totals = [counts[name] for name in ("documents", "tokens", "bytes", "words", "split_words")]
    assert totals == [len(whole), sum(map(len, expected)), *table[:, 1:].sum(0)]


def test_names_of_documents(golden_hf: Path, preprocess: Any, tmp_path: Path) -> None:
    texts = many(golden_hf)
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert preprocess(tmp_path / "a.jsonl").status == 0
    assert (tmp_path / "bin/train.names.txt").read_text() == "".join(f"no\\n{i}\n" for i in range(len(texts)))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 4}\n\n{"text": "b", "id": {}}\n{"body": 1, "text": ""}\n')
    assert preprocess(tmp_path / "a.jsonl").status == 0  # other content: written again
    assert (tmp_path / "bin/train.names.txt").read_text() == "4\n\n\n"
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert preprocess(tmp_path / "a.jsonl").status == 0
    assert not (tmp_path / "bin/train.names.txt").exists()  # no document has a name: the old ones are gone


def test_a_whole_file_is_read_in_pieces(golden_hf: Path, tmp_path: Path, tokenizers: Any) -> None:
    """Pieces of about the size of a unit, cut where no token changes; all at once where that cannot be known."""
    from fairseq.models.huggingface.encoding import safe_cut

    path = tmp_path / "text"
    path.write_text((golden_hf / "text/wiki.train.txt").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_files, "UNIT", 4096)
        units = list(document_files.WholeFile(str(path), safe_cut(tokenizers["gpt2"])).units())
        assert len(units) > 10 and max(len(unit.raw) for unit in units) <= 3 * 4096
        assert b"".join(unit.raw for unit in units) == path.read_bytes()
        assert [unit.begins for unit in units] == [True] + [False] * (len(units) - 1)
        assert len(list(document_files.WholeFile(str(path), None).units())) == 1
        assert len(list(document_files.WholeFile(str(path), lambda before, after: False).units())) == 1


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "file"])
def test_an_interrupted_run_goes_on(
    kind: str, golden_hf: Path, preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted again and again: every run reads only what is left, and the files are those of one run."""
    write, flags, _ = KINDS[kind]
    write(tmp_path / kind, many(golden_hf))
    monkeypatch.setattr(document_files, "UNIT", 700)
    monkeypatch.setattr("fairseq.data.parquet_files.UNIT", 700)
    assert preprocess(tmp_path / kind, *flags, model="llama", out="once").status == 0
    append, appended = DocumentWriter.append, []

    def interrupted(self: DocumentWriter, encoded: Any) -> None:
        if len(appended) % 3 == 2:
            appended.append(None)
            raise KeyboardInterrupt
        appended.append(encoded.end)
        append(self, encoded)

    monkeypatch.setattr(DocumentWriter, "append", interrupted)
    runs = [preprocess(tmp_path / kind, *flags, model="llama")]
    while runs[-1].status == 130:
        assert "run the same command again to go on" in runs[-1].stderr
        runs.append(preprocess(tmp_path / kind, *flags, model="llama"))
    assert runs[-1].status == 0 and len(runs) > 2
    ends = [end for end in appended if end is not None]
    assert ends == sorted(set(ends))  # nothing was made twice
    assert written(tmp_path / "bin") == written(tmp_path / "once")


@pytest.mark.parametrize("damaged", [False, True])
def test_unfinished_files_that_differ_are_not_used(
    damaged: bool, golden_hf: Path, preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a changed byte in what an interrupted run left, the next one begins anew."""
    text = tmp_path / "text"
    text.write_text("".join(many(golden_hf)))
    monkeypatch.setattr(document_files, "UNIT", 700)
    assert preprocess(text, out="once").status == 0
    append, appended = DocumentWriter.append, []

    def interrupted(self: DocumentWriter, encoded: Any) -> None:
        append(self, encoded)
        appended.append(encoded)
        if len(appended) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(DocumentWriter, "append", interrupted)
    assert preprocess(text).status == 130
    if damaged:
        (left,) = (tmp_path / "bin").glob("train.bin.*.tmp")
        content = bytearray(left.read_bytes())
        content[10] ^= 1
        left.write_bytes(content)
    done = preprocess(text)
    assert done.status == 0
    assert ("an earlier run cannot be continued" in done.stdout) == damaged
    assert ("going on after" in done.stdout) == (not damaged)
    assert written(tmp_path / "bin") == written(tmp_path / "once")


def test_a_finished_split_is_kept(golden_hf: Path, preprocess: Any, tmp_path: Path) -> None:
    """The same command does nothing again; a changed setting, text or output is noticed."""
    text = tmp_path / "text"
    text.write_text("one\ntwo\n")
    assert "is there already" not in preprocess(text).stdout
    assert "is there already" in preprocess(text).stdout
    assert "is there already" not in preprocess(text, "--hf-eos", "none").stdout
    assert "is there already" not in preprocess(text).stdout
    text.write_text("one\ntwa\n")
    assert "is there already" not in preprocess(text).stdout
    data = bytearray((tmp_path / "bin/train.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "bin/train.bin").write_bytes(data)
    again = preprocess(text)
    assert "is there already" not in again.stdout and "written again" in again.stdout + again.stderr
    assert (tmp_path / "bin/train.bin").read_bytes()[0] == data[0] ^ 1


# -- separators, by a reference that knows no units


@pytest.mark.parametrize("seed", range(40))
def test_separators(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random files of separators, line ends and other text: units of any size give what one look at the file gives."""
    random = np.random.default_rng(seed)
    pieces = ["=", "==", "=\n", "\n=\n", "\r\n", "\n", "=\r\n", "ab", "ü", " "]
    content = "".join(random.choice(pieces, size=random.integers(0, 60))).encode()
    path = tmp_path / "text"
    path.write_bytes(content)
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", content)
    by_line: list[bytes] = [b""]
    for line in lines:
        if line.removesuffix(b"\n").removesuffix(b"\r") == b"=":
            by_line.append(b"")
        else:
            by_line[-1] += line
    anywhere = content.split(b"==")
    for separator, where, expected in (("=", False, by_line), ("==", True, anywhere)):
        expected = expected[:-1] if not expected[-1] else expected
        for unit in (1, 3, 7, 1000):
            monkeypatch.setattr(document_files, "UNIT", unit)
            source = SeparatedFile(str(path), separator, where)
            found = [text for unit in source.units() for text in source.documents(unit).texts]
            assert found == [text.decode() for text in expected], (unit, where, content)
            for place in list(source.units()):  # an interrupted run goes on at the end of any unit
                rest = [text for unit in source.units(place.end) for text in source.documents(unit).texts]
                assert found[len(found) - len(rest) :] == rest
    source_of_lines = LineFile(str(path), True)
    assert [text for unit in source_of_lines.units() for text in source_of_lines.documents(unit).texts] == [
        line.decode() for line in lines
    ]


# -- odd inputs

NAMELESS = "1 objects whose id is neither"
ODD: dict[str, tuple[str, bytes, list[str], list[str] | None, str]] = {
    # name -> (file, content, flags, documents or None for a refusal, what is said)
    "empty": ("t.txt", b"", [], [], "is empty"),
    "empty whole file": ("t.txt", b"", ["--hf-documents", "file"], [], "is empty"),
    "empty records": ("t.jsonl", b"", [], [], "is empty"),
    "blank records": ("t.jsonl", b"\n  \n", [], [], "is empty"),
    "empty lines": ("t.txt", b"\n\na\n\n", [], ["", "", "a", ""], ""),
    "no end of line": ("t.txt", b"a\nb", [], ["a", "b"], ""),
    "one token": ("t.txt", b"a", ["--hf-documents", "file"], ["a"], ""),
    "carriage returns": ("t.txt", b"a\r\nb\r\n", [], ["a", "b"], ""),
    "carriage returns alone": ("t.txt", b"a\rb\n", [], ["a\rb"], "1 carriage returns that no line feed follows"),
    "nul": ("t.txt", b"a\0b and more words\n", [], ["a\0b and more words"], "1 NUL bytes"),
    "mark": ("t.txt", b"\xef\xbb\xbfa\n", [], ["\ufeffa"], "1 byte order marks"),
    "mark before records": ("t.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', [], ["a"], ""),
    "special token": ("t.txt", b"a<|endoftext|>b\n", [], ["a<|endoftext|>b"], "found 1 special tokens"),
    "only separators": ("t.txt", b"---\n---\n", ["--document-separator=---"], ["", ""], ""),
    "no separator": ("t.txt", b"a\n", ["--document-separator=---"], ["a\n"], "the whole file is one document"),
    "blank lines separate": ("t.txt", b"a\n\nb\n", ["--document-separator", ""], ["a\n", "b\n"], ""),
    "records in a text": ("t.json", b'{"text": "a"}\n', [], ['{"text": "a"}'], "is read as plain text"),
    "numbers as names": ("t.jsonl", b'{"text": "a", "n": 7}', ["--name-field", "n"], ["a"], ""),
    "escapes": ("t.jsonl", b'{"text": "\\u00fc\\ud83d\\ude42"}', [], ["ü🙂"], ""),
    "a list as id": ("t.jsonl", b'{"text": "a", "id": []}', [], ["a"], NAMELESS),
    "a number that is none as id": ("t.jsonl", b'{"text": "a", "id": NaN}', [], ["a"], NAMELESS),
    "a truth value as id": ("t.jsonl", b'{"text": "a", "id": false}', [], ["a"], NAMELESS),
    "half a character as id": ("t.jsonl", b'{"text": "a", "id": "\\ud800"}', [], ["a"], NAMELESS),
    "no id": ("t.jsonl", b'{"text": "a", "id": null}\n{"text": "b", "id": ""}', [], ["a", "b"], ""),
    "no utf-8": ("t.txt", b"fine\n\xff\n", [], None, "byte 0xff at offset 5, which is not UTF-8"),
    "no utf-8 between": ("t.txt", b"a\n-\n\xff\n", ["--document-separator=-"], None, "byte 0xff at offset 4"),
    "utf-16": ("t.txt", "word\n".encode("utf-16"), [], None, "the byte order mark of UTF-16LE"),
    "binary": ("t.txt", bytes(range(7)) * 100 + bytes(200), [], None, "NUL bytes among the first"),
    "no json": ("t.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', [], None, "t.jsonl line 3: found what is no JSON"),
    "deep json": ("t.jsonl", b"[" * 100_000, [], None, "t.jsonl line 1: found what is no JSON"),
    "no object": ("t.jsonl", b'["a"]\n', [], None, "line 1: found a JSON array, expected one JSON object a line"),
    "no field": ("t.jsonl", b'{"body": "a"}\n', [], None, "no field 'text' (its fields: body)"),
    "a number": ("t.jsonl", b'{"text": 3}\n', [], None, "'text' that is a JSON number, expected a string"),
    "nothing": ("t.jsonl", b'{"text": null}\n', [], None, "'text' that is a JSON null, expected a string"),
    "half a character": ("t.jsonl", b'{"text": "\\ud800"}\n', [], None, "half of a surrogate pair in 'text'"),
    "no name": ("t.jsonl", b'{"text": "a"}\n', ["--name-field", "n"], None, "no field 'n' (its fields: text)"),
    "a list as name": ("t.jsonl", b'{"text": "a", "n": []}', ["--name-field", "n"], None, "'n' that is a JSON array"),
    "no number as name": ("t.jsonl", b'{"text": "a", "n": NaN}', ["--name-field", "n"], None, "a JSON number"),
    "a separator of lines": ("t.txt", b"a\n", ["--document-separator=-\n-"], None, "a line, without its line end"),
    "an empty separator": (
        "t.txt", b"a\n", ["--document-separator", "", "--hf-documents", "separated"], None, "found nothing",
    ),
    "no separator named": ("t.txt", b"a\n", ["--hf-documents", "separated"], None, "--document-separator beside it"),
    "two dashes": ("t.txt", b"a\n", ["--document-separator=--"], None, "--document-separator: found --"),
    "two kinds": ("t.txt", b"a\n", ["--hf-documents", "file", "--document-separator=-"], None, "one of them"),
    "a field of a text": ("t.txt", b"a\n", ["--text-field", "body"], None, "expected a .jsonl or .parquet file"),
    "lines of records": ("t.jsonl", b"{}\n", ["--hf-documents", "line"], None, "expected a text file"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_inputs(case: str, preprocess: Any, tmp_path: Path, tokenizers: Any) -> None:
    name, content, flags, expected, said = ODD[case]
    (tmp_path / name).write_bytes(content)
    done = preprocess(tmp_path / name, *flags)
    if expected is None:
        assert said in done.error
        assert not list(tmp_path.glob("bin/train*"))  # and nothing is left
        return
    assert done.status == 0, done.stderr
    assert said in done.stdout + done.stderr
    eos = tokenizers["gpt2"].eos_token_id
    found = documents(tmp_path / "bin") if (tmp_path / "bin/train.bin").stat().st_size else []
    assert found == [[*tokenizers["gpt2"](text)["input_ids"], eos] for text in expected]
    warned = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert bool(warned) == bool(said), warned


ODD_COLUMNS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no column": ({"body": ["a"]}, [], "no column 'text' (its columns: body)"),
    "numbers": ({"text": [3]}, [], "the column 'text' of type int64, expected one of strings"),
    "a null": ({"text": ["a", None]}, [], "row 2: found no 'text' (null), expected a string"),
    "no names": ({"text": ["a"]}, ["--name-field", "n"], "no column 'n'"),
    "lists as names": ({"text": ["a"], "n": [[1]]}, ["--name-field", "n"], "the column 'n' of type list"),
}


@pytest.mark.parametrize("case", ODD_COLUMNS)
def test_odd_columns(case: str, preprocess: Any, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns, flags, said = ODD_COLUMNS[case]
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert said in preprocess(tmp_path / "t.parquet", *flags).error
    assert not list(tmp_path.glob("bin/train*"))


def test_damaged_columns(preprocess: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "none.parquet").write_bytes(b"PAR1 no more")
    assert "no parquet file" in preprocess(tmp_path / "none.parquet").error
    write_parquet(tmp_path / "t.parquet", ["some text of a document"] * 100)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "t.parquet").write_bytes(content)
    assert "rows that cannot be read" in preprocess(tmp_path / "t.parquet").error


def test_parquet_without_pyarrow(preprocess: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    error = preprocess(tmp_path / "t.parquet").error
    assert "needs the Python module pyarrow" in error and ".[parquet]" in error


def test_a_killed_worker_is_one_sentence(golden_hf: Path, preprocess: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from fairseq.models.huggingface.encoding import DocumentEncoder

    def die(self: Any, unit: Any) -> None:
        __import__("os")._exit(9)

    monkeypatch.setattr(DocumentEncoder, "__call__", die)
    done = preprocess(golden_hf / "text/wiki.valid.txt", "--workers", 2)
    assert "a worker process was killed; try fewer --workers" in done.error
