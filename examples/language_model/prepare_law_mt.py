"""Law-MT (Koehn and Knowles, 2017; split by Aharoni and Goldberg, 2020) as text that the WMT19 English language model
reads: raw sentences, one a line, through Moses' tokeniser and the BPE codes that come with the model.

Tokeniser and codes are those of `--tokenizer moses --bpe fastbpe`, so that the model's hub interface splits text in the
same way. Both forms of codes files are read: fastBPE's (merges with counts, no header; the model's file `bpecodes`) and
subword-nmt's. Needs the extra `text`: sacremoses and subword-nmt."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

from fairseq.data.encoders import build_bpe, build_tokenizer
from fairseq.errors import BadFile, BadFlag, MissingFile
from fairseq.files.atomic_io import atomic_write
from fairseq.flag_types import Parser, positive_int
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("prepare_law_mt")

SPLITS = ("train", "valid", "test")
LINES_PER_TASK = 2000


class Pipeline:
    """Encodes a raw line to subwords. One object is made in each process."""

    def __init__(self, args: Namespace) -> None:
        options = Namespace(
            tokenizer="moses",
            source_lang=args.lang,
            target_lang=args.lang,
            moses_no_dash_splits=args.no_dash_splits,
            moses_no_escape=args.no_escape,
            bpe="fastbpe",
            bpe_codes=str(args.codes),
        )
        self.tokenizer, self.bpe = build_tokenizer(options), build_bpe(options)
        self.normalize = None
        if args.normalize_punctuation:
            import sacremoses  # beside the tokeniser, so it is there

            self.normalize = sacremoses.MosesPunctNormalizer(args.lang).normalize

    def __call__(self, line: str) -> str:
        """Pieces separated by single spaces."""
        text = line.strip()
        if self.normalize is not None:
            text = self.normalize(text)
        return self.bpe.encode(self.tokenizer.encode(text)).strip()


_pipeline: Pipeline


def _start(args: Namespace) -> None:
    global _pipeline
    _pipeline = Pipeline(args)


def _encode(lines: list[str]) -> list[str]:
    return [_pipeline(line) for line in lines]


Encode = Callable[[Iterator[list[str]]], Iterator[list[str]]]


@contextmanager
def encoder(args: Namespace) -> Iterator[Encode]:
    """A function that encodes groups of lines to groups of lines of subwords, in order, with `args.workers`
    processes."""
    if args.workers == 1:
        _start(args)
        yield partial(map, _encode)
        return
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _start, (args,)) as pool:
        yield partial(pool.map, _encode)


def prepare(source: Path, path: Path, encode: Encode) -> None:
    """Writes the pieces of one text."""
    words = pieces = lines = 0
    try:
        with open(source, encoding="utf-8", newline="\n") as stream, atomic_write(path, "w") as output:
            groups = iter(lambda: list(islice(stream, LINES_PER_TASK)), [])
            for line in chain.from_iterable(encode(groups)):
                output.write(line + "\n")
                parts = line.split()
                lines += 1
                pieces += len(parts)
                words += len(parts) - sum(part.endswith("@@") for part in parts)
    except UnicodeDecodeError as error:
        raise BadFile(source, f"bytes that are not UTF-8 ({error.reason})", "UTF-8 text") from error
    logger.info("wrote %s: %d lines, %d words in %d pieces, %d tokens", path, lines, words, pieces, pieces + lines)


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = Parser(description="Prepares Law-MT, or any raw text, for the WMT19 language model.")
    add = parser.add_argument
    for split in SPLITS:
        add(f"--{split}", type=Path, metavar="FILE", help=f"raw text of the {split} split, one sentence a line")
    add("--codes", type=Path, required=True, metavar="FILE", help="BPE codes: the model's bpecodes")
    add("--dest", type=Path, default=Path("law"), metavar="DIR", help="folder for train.txt, valid.txt and test.txt")
    add("--lang", default="en", help="language of the tokeniser")
    add("--no-dash-splits", action="store_true", help="leave a-b whole instead of a @-@ b")
    add("--no-escape", action="store_true", help="leave ' & and the like instead of &apos; &amp;")
    add("--normalize-punctuation", action="store_true", help="normalise punctuation first, as Moses' script does")
    add("--workers", type=positive_int, default=1, metavar="N", help="processes")
    return parser


def main() -> None:
    """Prepares the given splits, except for those whose output exists."""
    args = get_parser().parse_args()
    sources = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}
    if not sources:
        raise BadFlag("--train", "nothing", "at least one of --train, --valid and --test")
    for path in (args.codes, *sources.values()):
        if not path.is_file():
            raise MissingFile(path)
    Pipeline(args)  # a missing library or unreadable codes show before any work is done
    missing = {}
    for split, source in sources.items():
        path = args.dest / f"{split}.txt"
        if path.exists():
            logger.info("%s exists and is left as it is", path)
        else:
            missing[path] = source
    with encoder(args) as encode:
        for path, source in missing.items():
            prepare(source, path, encode)


if __name__ == "__main__":
    cli_entry(main)
