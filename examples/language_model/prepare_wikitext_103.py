"""WikiText-103 (Merity et al., 2016) as the three token files that language modelling starts from.

The dataset is no longer at its original address; its authors publish it on the Hugging Face hub as
`Salesforce/wikitext`, whose folder `wikitext-103-v1` has Parquet files with one row per line. Each file is downloaded
(an interrupted download is continued), compared with the sha256 in the hub's listing, and converted to the published
text: an empty row was the line " ". `--local` takes files from elsewhere: a folder or zip archive with
wiki.{train,valid,test}.tokens, or a folder of those Parquet files. Whatever the source, the text's lines, tokens and
sha256 are compared with the published ones."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fairseq.errors import BadFile, BadFlag, MissingDependency, MissingFile, UserError
from fairseq.files.atomic_io import atomic_write, require_free_space
from fairseq.files.output_lock import exclusive
from fairseq.flag_types import Parser
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("prepare_wikitext_103")

HUB = "https://huggingface.co"
DATASET, FOLDER, REVISION = "Salesforce/wikitext", "wikitext-103-v1", "main"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """Properties of the published text of a split. tokens: words and line ends; sha256: of the first `hashed` bytes."""

    lines: int
    tokens: int
    hashed: int
    sha256: str
    parquet: str

    def checked(self, path: Path, found: Measured) -> None:
        """BadFile when `found` is something else."""
        for name in ("lines", "tokens", "sha256"):
            theirs, ours = getattr(self, name), getattr(found, name)
            if theirs != ours:
                what = f"{name} {ours}" if name == "sha256" else f"{ours} {name}"
                raise BadFile(path, what, f"{theirs}, as published", "get the files again, or pass --no-verify")


PUBLISHED = {  # small splits first, so that a wrong source is detected early
    "valid": Published(
        3760, 217646, 1142309, "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b", "validation"
    ),
    "test": Published(
        4358, 245569, 1281077, "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9", "test"
    ),
    "train": Published(
        1801350, 103227021, 2867097, "4c6f50bfecb1f80034941bcb95500c9bd597d0be10a2e288aec068105e125388", "train"
    ),
}


class Measured:
    """Measures a text while it is written: lines, tokens (words and line ends) and the sha256 of the first bytes."""

    def __init__(self, hashed: int) -> None:
        self.lines = self.words = 0
        self._digest, self._to_hash, self._inside = hashlib.sha256(), hashed, False

    def add(self, chunk: bytes) -> None:
        """Bytes that follow those added before."""
        if not chunk:
            return
        self._digest.update(chunk[: self._to_hash])
        self._to_hash -= min(len(chunk), self._to_hash)
        letters = np.frombuffer(chunk, np.uint8)
        inside = letters > 32  # the text has no whitespace but spaces and line ends
        self.lines += int((letters == 10).sum())
        self.words += int((inside[1:] & ~inside[:-1]).sum()) + int(inside[0] and not self._inside)
        self._inside = bool(inside[-1])

    @property
    def tokens(self) -> int:
        """Words and line ends."""
        return self.words + self.lines

    @property
    def sha256(self) -> str:
        """Of the first bytes."""
        return self._digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def fetch(hub: str, folder: Path) -> None:
    """Puts the hub's Parquet files into `folder`, each compared with the sha256 in the hub's listing."""
    files = hub_listing(hub)
    missing = [entry for entry in files if not (folder / Path(entry["path"]).name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    require_free_space(folder / "x", sum(entry["size"] for entry in missing), f"downloading {DATASET}")
    for entry in missing:
        download(
            f"{hub}/datasets/{DATASET}/resolve/{REVISION}/{entry['path']}",
            folder / Path(entry["path"]).name,
            entry["size"],
            entry["lfs"]["oid"],
        )


def hub_listing(hub: str) -> list[dict[str, Any]]:
    """The Parquet files as the hub describes them: path, size, and lfs.oid, the sha256."""
    url = f"{hub}/api/datasets/{DATASET}/tree/{REVISION}/{FOLDER}"
    with _open(url) as answer:
        try:
            entries = [entry for entry in json.load(answer) if entry["path"].endswith(".parquet")]
            complete = all(isinstance(entry["size"], int) and len(entry["lfs"]["oid"]) == 64 for entry in entries)
        except (ValueError, KeyError, TypeError):
            entries, complete = [], False
    if not entries or not complete:
        raise BadFile(url, "no list of Parquet files with checksums", "one", "use --local with files from elsewhere")
    return entries


def download(url: str, path: Path, size: int, sha256: str) -> None:
    """Downloads to `path`, continuing the file `path.part` of an earlier run; BadFile for a wrong size or sha256."""
    with exclusive(path):
        _download(url, path, size, sha256)


def _download(url: str, path: Path, size: int, sha256: str) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as stream:
        have = stream.tell()
        if have < size:
            logger.info("downloading %s: %.1f MB%s", url, size / 1e6, f", {have / 1e6:.1f} MB are here" if have else "")
            with _open(url, have) as answer:
                if have and answer.status != 206:  # the server sends all of it again
                    stream.truncate(0)
                shutil.copyfileobj(answer, stream, CHUNK)
    with open(part, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    short = part.stat().st_size < size
    if found != sha256:
        if short:
            raise UserError(f"{url}: the connection ended after {part.stat().st_size} of {size} bytes; run this again")
        part.unlink()
        raise BadFile(url, f"sha256 {found}", f"{sha256} as the hub states", "run this again, or use --local")
    os.replace(part, path)


def _open(url: str, start: int = 0) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except (urllib.error.URLError, ValueError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url}: could not be reached ({reason}); check the connection or --hub, or use --local with a folder "
            "or zip that holds wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# From a source to chunks of text


def source_chunks(source: Path, split: str, stack: ExitStack) -> Iterable[bytes]:
    """The text of a split from a zip archive, a folder of token files or a folder of Parquet files."""
    name = f"wiki.{split}.tokens"
    if source.is_dir():
        found = sorted(source.glob(name)) or sorted(source.glob(f"*/{name}"))
        if found:
            return _read(stack.enter_context(open(found[0], "rb")))
        files = sorted(source.glob(f"{PUBLISHED[split].parquet}*.parquet"))
        if files:
            return parquet_chunks(files)
        raise MissingFile(source / name, f"expected it or {PUBLISHED[split].parquet}*.parquet in the folder")
    if not source.exists():
        raise BadFlag("--local", source, "a folder or a zip archive that exists")
    if not zipfile.is_zipfile(source):
        raise BadFile(source, "neither a folder nor a zip archive", "one of them")
    archive = stack.enter_context(zipfile.ZipFile(source))
    members = [member for member in archive.namelist() if Path(member).name == name]
    if not members:
        raise BadFile(source, f"no {name}", f"{name} in the archive")
    return _read(stack.enter_context(archive.open(members[0])))


def _read(stream: Any) -> Iterator[bytes]:
    return iter(lambda: stream.read(CHUNK), b"")


def parquet_chunks(files: list[Path]) -> Iterator[bytes]:
    """Rows of the column "text", joined; each ends in a line end but the empty ones, which stood for " "."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependency("pyarrow", "reading the hub's Parquet files", "pip install pyarrow") from error
    for file in files:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(columns=["text"]):
                yield "".join(row or " \n" for row in batch.column(0).to_pylist()).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The files


def prepare(split: str, source: Path, path: Path, verify: bool) -> None:
    """Writes the split's text to `path`, compared with the published one unless told otherwise."""
    found = Measured(PUBLISHED[split].hashed)
    with ExitStack() as stack, atomic_write(path) as stream:
        copy(source_chunks(source, split, stack), stream, found)
        if verify:
            PUBLISHED[split].checked(path, found)
    logger.info(
        "wrote %s: %d lines, %d tokens (%s)",
        path,
        found.lines,
        found.tokens,
        "as published" if verify else "--no-verify: not compared with the published text",
    )


def copy(chunks: Iterable[bytes], stream: BinaryIO, found: Measured) -> None:
    """Writes the chunks and measures them."""
    for chunk in chunks:
        found.add(chunk)
        stream.write(chunk)


def verify_existing(split: str, path: Path) -> None:
    """BadFile when a file of an earlier run is not the published text."""
    found = Measured(PUBLISHED[split].hashed)
    with open(path, "rb") as stream:
        for chunk in _read(stream):
            found.add(chunk)
    PUBLISHED[split].checked(path, found)


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = Parser(description="Prepares WikiText-103.")
    add = parser.add_argument
    add("--dest", type=Path, default=Path("wikitext-103"), metavar="DIR", help="folder for wiki.*.tokens")
    add("--local", type=Path, metavar="PATH", help="take the text from this folder or zip instead of downloading it")
    add("--hub", default=os.environ.get("HF_ENDPOINT", HUB), metavar="URL", help="address of the hub or a mirror of it")
    add("--keep-download", action="store_true", help="keep the Parquet files")
    add("--no-verify", action="store_true", help="do not compare the text with the published one")
    return parser


def main() -> None:
    """Downloads if need be, then writes the three files."""
    args = get_parser().parse_args()
    paths = {split: args.dest / f"wiki.{split}.tokens" for split in PUBLISHED}
    missing = [split for split, path in paths.items() if not path.exists()]
    for split in paths.keys() - missing:
        logger.info("%s exists and is left as it is", paths[split])
        if not args.no_verify:
            verify_existing(split, paths[split])
    if missing:
        source = args.dest / "download" if args.local is None else args.local
        if args.local is None:
            fetch(args.hub.rstrip("/"), source)
        for split in missing:
            prepare(split, source, paths[split], not args.no_verify)
    if args.local is None and not args.keep_download:
        shutil.rmtree(args.dest / "download", ignore_errors=True)


if __name__ == "__main__":
    cli_entry(main)
