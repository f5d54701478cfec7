"""`preprocess.py`: text files to a data folder (`dict.txt`, `train.bin`/`.idx`, ...).

File names, log lines and the dictionary's order follow fairseq 0.9; `fairseq.data.binarization` does the work."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.data.binarization import (
    Binarizer,
    NumberedText,
    Summary,
    binarize_file,
    parse_alignment,
)
from fairseq.data.indexed_dataset import make_builder
from fairseq.data.text_description import describe_text
from fairseq.data.text_encoder import TextEncoder
from fairseq.data.text_words import read_pieces
from fairseq.data.token_ids import TokenIds
from fairseq.data.vocabulary import Progress, build_dictionary
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.atomic_io import atomic_write, open_log, writing
from fairseq.files.inputs import regular_size
from fairseq.files.odd_characters import MARKS, begins_with_mark, odd_sentences, refuse_other_encodings
from fairseq.files.outputs import ITEMS_INDEX, LOG, RAW, Kind, claimed, description
from fairseq.flags.layouts import PREPROCESSING
from fairseq.models.huggingface import TokenizedText
from fairseq_cli.entry import cli_entry, log_start

logger = logging.getLogger("fairseq_cli.preprocess")

WROTE = "Wrote preprocessed data to "  # begins the last line of a run's log


class DictionaryExists(UserError, FileExistsError):
    """A dictionary exists where a new one would be written."""


class Preprocessor:
    """One run: its options, and the training texts that were read to build the dictionary and are written
    afterwards."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.langs = [args.source_lang] if args.only_source else [args.source_lang, args.target_lang]
        self.numbered: dict[str, NumberedText] = {}
        self.encoders = {lang: TextEncoder.build(args, lang) for lang in self.langs}

    def text_path(self, prefix: str, lang: str | None) -> str:
        """The input file of a prefix: `prefix`, or `prefix.lang`."""
        path = prefix + (f".{lang}" if lang else "")
        regular_size(path, "check --trainpref, --validpref, --testpref and the languages")
        return path

    def dict_path(self, lang: str | None) -> str:
        """`dict.txt`, or `dict.lang.txt`."""
        return os.path.join(self.args.destdir, f"dict.{lang}.txt" if lang else "dict.txt")

    def output_prefix(self, split: str, lang: str | None) -> str:
        """`train` for language modelling, else `train.src-tgt.lang`."""
        pair = f".{self.args.source_lang}-{self.args.target_lang}"
        suffix = f"{pair}.{lang}" if lang else "" if self.args.only_source else pair
        return os.path.join(self.args.destdir, split + suffix)

    @contextlib.contextmanager
    def progress(self, path: str) -> Iterator[Progress]:
        """A progress bar over the bytes of a file, shown where standard error is a terminal."""
        off = True if getattr(self.args, "no_progress_bar", False) else None
        size = os.path.getsize(path)
        with tqdm(total=size, unit="B", unit_scale=True, desc=os.path.basename(path), disable=off) as bar:
            yield bar.update

    def dictionaries(self, stack: contextlib.ExitStack) -> list[Dictionary]:
        """The dictionary of each language, loaded or built."""
        args = self.args
        given = [args.srcdict, args.tgtdict]
        if args.joined_dictionary:
            if args.srcdict and args.tgtdict:
                raise BadFlag("--joined-dictionary", "both --srcdict and --tgtdict", "at most one of them")
            path = args.srcdict or args.tgtdict
            joined = self._load(path) if path else self._build(self.langs, 0, stack)
            return [joined for _ in self.langs]
        return [
            self._load(path) if path else self._build([lang], k, stack)
            for k, (path, lang) in enumerate(zip(given, self.langs))
        ]

    def _load(self, path: str) -> Dictionary:
        dictionary: Dictionary = tasks.TASK_REGISTRY.get(self.args.task, tasks.FairseqTask).load_dictionary(path)
        if len(dictionary) == dictionary.nspecial:
            raise BadFile(path, "no words", "the dict.txt that preprocess wrote", "every word would become <unk>")
        return dictionary

    def _build(self, langs: list[str | None], k: int, stack: contextlib.ExitStack) -> Dictionary:
        """Counts the words of the training text of `langs`; k: which thresholds apply (0 source, 1 target)."""
        args = self.args
        if not args.trainpref:
            raise BadFlag("--trainpref", "nothing", f"a training text or --{'tgt' if k else 'src'}dict")
        keep = args.dataset_impl != "raw" and not getattr(args, "dict_only", False)
        vocabularies = []
        for path, lang in {self.text_path(args.trainpref, lang): lang for lang in langs}.items():
            if path not in self.numbered:
                prefix = self.output_prefix("train", lang) if keep else None
                with self.progress(path) as progress:
                    self.numbered[path] = stack.enter_context(
                        NumberedText(path, prefix, args.workers, progress, self.encoders[lang])
                    )
                if prefix is None:
                    self._warn_of_odd_characters(path, self.numbered[path].vocabulary.odd)
            vocabularies.append(self.numbered[path].vocabulary)
        threshold, nwords = [(args.thresholdsrc, args.nwordssrc), (args.thresholdtgt, args.nwordstgt)][k]
        return build_dictionary(vocabularies, threshold, nwords, args.padding_factor)

    def output_files(self, log: str) -> dict[str, Kind]:
        """The files that a run may write."""
        files = {log: LOG} | {self.dict_path(lang): LOG for lang in self.langs}
        for split, _ in self.splits():
            for lang in self.langs:
                output = self.output_prefix(split, lang)
                files |= {output + ".bin": RAW, output + ".idx": ITEMS_INDEX, output + ".json": description("text")}
        return files

    def check_inputs(self, log: str) -> None:
        """Checks inputs and outputs before anything is written; UserError for missing inputs, and for files that would
        be overwritten. log: the log of earlier runs."""
        if TokenIds.described_in(self.args.destdir):
            found = f"{self.args.destdir}, which holds a text of a tokenizer"
            raise BadFlag("--destdir", found, "a folder of its own for a text of words")
        for flag, prefixes in (("--validpref", self.args.validpref), ("--testpref", self.args.testpref)):
            if prefixes and not all(prefixes.split(",")):
                raise BadFlag(flag, repr(prefixes), "text files separated by commas")
        for split, prefix in self.splits():
            if split != "train" and getattr(self.args, "dict_only", False):
                continue
            for lang in self.langs:
                path = self.text_path(prefix, lang)
                refuse_other_encodings(path)
                if begins_with_mark(path):
                    logger.warning("%s begins with a byte order mark, which becomes part of its first word", path)
        given = [] if self.args.joined_dictionary and self.args.tgtdict else [self.args.srcdict, self.args.tgtdict]
        for path in given:
            if path:
                regular_size(path, "give the dictionary that preprocess wrote")
        for path in self._alignments():
            regular_size(path)
        if not self._unfinished(log):
            self._refuse_to_replace_dictionaries()

    def _unfinished(self, log: str) -> bool:
        """Whether the last run in the log had the same command and was killed before its end."""
        if not os.path.isfile(log):
            return False
        with open(log, encoding="utf-8", errors="replace") as stream:
            marks = [line.rstrip("\n") for line in stream if line.startswith(("Namespace(", WROTE))]
        return marks[-1:] == [str(self.args)]

    def _refuse_to_replace_dictionaries(self) -> None:
        given = [self.args.srcdict, self.args.tgtdict]
        if self.args.joined_dictionary:
            given = [self.args.srcdict or self.args.tgtdict] * 2
        for flag, path, lang in zip(("--srcdict", "--tgtdict"), given, self.langs):
            if not path and os.path.exists(self.dict_path(lang)):
                raise DictionaryExists(
                    f"{self.dict_path(lang)}: a dictionary exists already, expected none; "
                    f"remove it, choose another --destdir, or reuse it with {flag}"
                )

    @staticmethod
    def _warn_of_odd_characters(path: str, odd: Counter[str]) -> None:
        odd = odd.copy()
        if begins_with_mark(path):  # said before
            odd[MARKS] -= 1
        for sentence in odd_sentences(odd):
            logger.warning("%s: found %s", path, sentence)

    def splits(self) -> Iterator[tuple[str, str]]:
        """(split name, text prefix) of all splits."""
        return splits_of(self.args)

    def write_split(self, split: str, prefix: str, lang: str | None, dictionary: Dictionary) -> None:
        """Binarises one text file, or copies it for the raw format."""
        text = self.text_path(prefix, lang)
        if self.args.dataset_impl == "raw":
            self._copy(text, split, lang, dictionary)
            return
        logger.info("[%s] Dictionary: %d types", lang, len(dictionary) - 1)
        output = self.output_prefix(split, lang)
        builder = make_builder(output + ".bin", self.args.dataset_impl, len(dictionary))
        try:
            if split == "train" and text in self.numbered:
                summary = self.numbered[text].write(builder, dictionary)
            else:
                with self.progress(text) as progress:
                    summary = binarize_file(
                        text, output, dictionary, builder, self.args.workers, progress, self.encoders[lang]
                    )
            builder.finalize(output + ".idx")
        except BaseException:
            builder.abandon()
            raise
        describe_text(output, dictionary)
        self._report(lang, text, summary, dictionary)

    def _report(self, lang: str | None, text: str, summary: Summary, dictionary: Dictionary) -> None:
        share = 100 * summary.nunk / max(1, summary.ntok)
        found = f"{summary.nseq} sents, {summary.ntok} tokens, {share:.3}%"
        logger.info("[%s] %s: %s replaced by %s", lang, text, found, dictionary.unk_word)
        self._warn_of_odd_characters(text, summary.odd)
        if 2 * summary.nunk > summary.ntok - summary.nseq > 0:
            logger.warning(
                "%s: more than half of the words are unknown; the dictionary may be of another text, or of text that "
                "another --tokenizer or --bpe prepared",
                text,
            )
        if not summary.ntok:
            logger.warning("%s is empty: training and evaluation will find nothing in this split", text)

    def _copy(self, text: str, split: str, lang: str | None, dictionary: Dictionary) -> None:
        # As in fairseq, the name contains the languages even where there are none.
        name = f"{split}.{self.args.source_lang}-{self.args.target_lang}" + (f".{lang}" if lang else "")
        output = os.path.join(self.args.destdir, name)
        encoder, odd = self.encoders[lang], Counter[str]()
        with atomic_write(output) as stream:
            if encoder is None:
                with open(text, "rb") as source:
                    shutil.copyfileobj(source, stream, 16 << 20)
            else:
                for piece in read_pieces(text, whole_lines=True):
                    stream.write(encoder.encode(piece, odd))
        describe_text(output, dictionary)

    def _alignments(self) -> dict[str, str]:
        """The alignment files beside the texts, and their splits."""
        if not self.args.align_suffix:
            return {}
        files = {f"{prefix}.{self.args.align_suffix}": split for split, prefix in self.splits()}
        return {path: split for path, split in files.items() if os.path.lexists(path)}

    def write_alignments(self) -> None:
        """Binarises the alignment files beside the text, where there are any."""
        for text, split in self._alignments().items():
            output = os.path.join(self.args.destdir, f"{split}.align.{self.args.source_lang}-{self.args.target_lang}")
            builder = make_builder(output + ".bin", self.args.dataset_impl)
            try:
                found = Binarizer.binarize_alignments(text, parse_alignment, builder.add_item)
                builder.finalize(output + ".idx")
            except BaseException:
                builder.abandon()
                raise
            logger.info("[alignments] %s: parsed %d alignments", text, found["nseq"])

    def run(self) -> None:
        """Dictionary first, then every split. A built dictionary is saved last: while it is missing, the same command
        can simply be run again."""
        with contextlib.ExitStack() as stack:
            dictionaries = self.dictionaries(stack)
            given = self.args.srcdict or self.args.tgtdict
            if given:
                self._save(dictionaries)
            if not getattr(self.args, "dict_only", False):
                for split, prefix in self.splits():
                    for lang, dictionary in zip(self.langs, dictionaries):
                        self.write_split(split, prefix, lang, dictionary)
                if self.args.align_suffix:
                    self.write_alignments()
        if not given:  # after the scratch files are gone: nothing is left to do once the dictionary is there
            self._save(dictionaries)

    def _save(self, dictionaries: list[Dictionary]) -> None:
        for lang, dictionary in zip(self.langs, dictionaries):
            dictionary.save(self.dict_path(lang))


def splits_of(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(split name, text prefix) of all splits: train, valid, valid1, ..., test, test1, ..."""
    if args.trainpref:
        yield "train", args.trainpref
    for split, prefixes in (("valid", args.validpref), ("test", args.testpref)):
        for k, prefix in enumerate(prefixes.split(",") if prefixes else []):
            yield split + (str(k) if k else ""), prefix


@contextlib.contextmanager
def _log_file(path: str, args: argparse.Namespace) -> Iterator[None]:
    """Appends all settings, by which a later run recognises a run to continue, and the bare messages to
    `preprocess.log`, also where the caller keeps logging quiet."""
    handler, level = logging.StreamHandler(open_log(path)), logger.level
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    try:
        handler.emit(logging.makeLogRecord({"msg": str(args)}))
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
        with writing(path):  # what it could not write before, it tries again
            handler.stream.close()


def main(args: argparse.Namespace) -> None:
    """Runs preprocess with parsed options."""
    if args.align_suffix and (getattr(args, "tokenizer", None) or getattr(args, "bpe", None)):
        raise BadFlag("--align-suffix", args.align_suffix, "no --tokenizer and --bpe: alignments count given words")
    if args.alignfile:
        raise BadFlag("--alignfile", args.alignfile, "nothing: alignment dictionaries are not built here")
    if getattr(args, "hf_tokenizer", None):
        return _tokenize(args)
    preprocessor = Preprocessor(args)
    log = os.path.join(args.destdir, "preprocess.log")
    preprocessor.check_inputs(log)
    log_start(logger, args)
    claim = claimed("--destdir", os.path.join(args.destdir, "preprocess"), preprocessor.output_files(log))
    with claim, _log_file(log, args):
        if not args.only_source and not (args.source_lang or args.target_lang):
            logger.warning("neither a language nor --only-source is given: language modelling needs --only-source")
        preprocessor.run()
        logger.info("%s%s", WROTE, args.destdir)


def _refuse_flags_of_words(args: argparse.Namespace) -> None:
    """BadFlag for a flag that says how words are found or counted, and is given beside `--hf-tokenizer`."""
    parser = options.get_preprocessing_parser()
    for flag in " ".join(PREPROCESSING.groups[group] for group in ("Words", "Dictionary")).split():
        name = flag.removeprefix("--").replace("-", "_")
        given = getattr(args, name, None)
        if given != parser.get_default(name):
            raise BadFlag(flag, given, "nothing with --hf-tokenizer, which brings words of its own", "drop the flag")


def _tokenize(args: argparse.Namespace) -> None:
    """`--hf-tokenizer`: the texts as tokens of a Hugging Face tokenizer."""
    _refuse_flags_of_words(args)
    text, log = TokenizedText(args, list(splits_of(args))), os.path.join(args.destdir, "preprocess.log")
    files = {log: LOG} | text.output_files()
    log_start(logger, args)
    with claimed("--destdir", os.path.join(args.destdir, "preprocess"), files), _log_file(log, args):
        text.run()
        logger.info("%s%s", WROTE, args.destdir)


def cli_main() -> None:
    """Console entry point."""
    goes_on = any(word.split("=")[0] == "--hf-tokenizer" for word in sys.argv)
    cli_entry(lambda: main(options.parse_preprocessing_args()), sys.stdout, goes_on)


if __name__ == "__main__":
    cli_main()
