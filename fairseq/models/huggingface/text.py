"""Text files to token ids by a Hugging Face tokenizer: `.bin`/`.idx` as fairseq's, an item a document, and beside them
what perplexities of words and bytes need."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from fairseq.data.document_files import DocumentFile, JsonLines, LineFile, SeparatedFile, WholeFile
from fairseq.data.document_writer import DocumentWriter, documents_path, names_path
from fairseq.data.parquet_files import ParquetFile
from fairseq.data.text_description import check_text, describe_text, text_counts
from fairseq.data.token_ids import FOLDER, NAME, TokenIds
from fairseq.data.workers import in_order
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.fingerprint import file_fingerprint
from fairseq.files.inputs import regular_size
from fairseq.files.odd_characters import refuse_other_encodings
from fairseq.files.outputs import ARRAY, ITEMS_INDEX, LOG, PROGRESS, RAW, Kind, description
from fairseq.models.huggingface.encoding import ODD, DocumentEncoder, added_tokens, one_thread, safe_cut
from fairseq.models.huggingface.folders import library, resolve
from fairseq.models.huggingface.tokenizers import copy_tokenizer, open_tokenizer, tokenizer_digest, tokenizer_files

logger = logging.getLogger(__name__)

DOCUMENTS = ("line", "line-with-end", "file", "separated")
RECORDS = {".jsonl": JsonLines, ".parquet": ParquetFile}  # files that say themselves what a document is
PROGRESS_SECONDS = 60.0  # between two lines in the log


def records_of(path: str) -> Any:
    """The class for a file of records, by the end of its name; None for a text."""
    return RECORDS.get(os.path.splitext(path)[1].lower())


class Pace:
    """Logs from time to time how far a file is, how fast that goes, and how long the rest will take: also where no
    progress bar is shown."""

    def __init__(self, start: int) -> None:
        self._start, self._began = start, time.monotonic()
        self._logged = self._began

    def log(self, source: DocumentFile, writer: DocumentWriter) -> None:
        """One line, unless the last one was a short time ago."""
        now = time.monotonic()
        if now - self._logged < PROGRESS_SECONDS:
            return
        self._logged = now
        rate = (writer.position - self._start) / (now - self._began)
        left = (source.size - writer.position) / rate if rate else float("inf")
        logger.info(
            "%s: %.1f %%, %d documents, %d tokens; %s a second, about %.0f minutes left", source.path,
            100 * writer.position / source.size, writer.counts["documents"], writer.counts["tokens"],
            f"{rate / 1e6:.2f} MB" if source.unit == "B" else f"{rate:.0f} rows", left / 60,
        )


class TokenizedText:
    """One run of preprocess with `--hf-tokenizer`. args: its flags; splits: (name, path of a text file)."""

    def __init__(self, args: argparse.Namespace, splits: list[tuple[str, str]]) -> None:
        self.args, self.splits = args, splits
        self._refuse_flags()
        for _, path in splits:
            regular_size(path, "check --trainpref, --validpref and --testpref")
            if records_of(path) is not ParquetFile:
                refuse_other_encodings(path)
        self._refuse_flags_of_documents()
        self.folder = resolve(args.hf_tokenizer, "--hf-tokenizer", weights=False)
        self.tokenizer = open_tokenizer(self.folder)
        self.digest = tokenizer_digest(self.tokenizer)
        self.eos = self.tokenizer.eos_token_id if args.hf_eos == "document" else None
        if args.hf_eos == "document" and self.eos is None:
            remedy = "give --hf-eos none, and score in windows with --max-length"
            raise BadFile(self.folder, "a tokenizer without EOS", "one that has it, to end documents", remedy)
        self.sources = {path: self._source(path) for _, path in splits}  # so that all are checked before one is written

    def _refuse_flags(self) -> None:
        args = self.args
        if not args.only_source or args.source_lang or args.target_lang:
            raise BadFlag("--hf-tokenizer", "a text with languages", "--only-source, and no language")
        if not self.splits:
            raise BadFlag("--trainpref", "nothing", "a text, here or in --validpref or --testpref")
        if args.dataset_impl != "mmap":
            raise BadFlag("--dataset-impl", args.dataset_impl, "mmap with --hf-tokenizer")
        if args.align_suffix:
            raise BadFlag("--align-suffix", args.align_suffix, "nothing with --hf-tokenizer", "drop the flag")
        if os.path.exists(os.path.join(args.destdir, "dict.txt")):
            raise BadFlag("--destdir", f"{args.destdir}, which holds a text of words", "a folder of its own")

    def _refuse_flags_of_documents(self) -> None:
        """BadFlag for flags that say what a document is and contradict each other, or concern none of the files."""
        args, records = self.args, [records_of(path) is not None for _, path in self.splits]
        separator, anywhere = args.document_separator, args.hf_documents == "separated"
        if separator is None and anywhere:
            raise BadFlag("--hf-documents", "separated", "--document-separator beside it, the text between documents")
        if separator is not None and args.hf_documents not in (None, "separated"):
            raise BadFlag("--document-separator", f"--hf-documents {args.hf_documents} beside it", "one of them")
        if separator is not None and not anywhere and ("\n" in separator or "\r" in separator):
            remedy = "for a text that may span lines, give --hf-documents separated too"
            raise BadFlag("--document-separator", repr(separator), "a line, without its line end", remedy)
        if separator == "" and anywhere:
            raise BadFlag("--document-separator", "nothing", "a text that stands between documents")
        for name in ("hf_documents", "document_separator"):
            if getattr(args, name) is not None and all(records):
                flag = "--" + name.replace("_", "-")
                raise BadFlag(flag, "only files whose records are documents", "a text file", "drop the flag")
        for name in ("text_field", "name_field"):
            if getattr(args, name) is not None and not any(records):
                flag = "--" + name.replace("_", "-")
                raise BadFlag(flag, "no file of records", f"a {' or '.join(RECORDS)} file", "drop the flag")

    def _source(self, path: str) -> DocumentFile:
        args, records = self.args, records_of(path)
        if records is not None:
            source: DocumentFile = records(path, args.text_field or "text", args.name_field)
            return source
        if path.lower().endswith((".json", ".ndjson")):
            logger.warning("%s is read as plain text; a file of JSON objects, one a line, has a name in .jsonl", path)
        if args.document_separator is not None:
            return SeparatedFile(path, args.document_separator, args.hf_documents == "separated")
        if args.hf_documents == "file":
            return WholeFile(path, safe_cut(self.tokenizer))
        return LineFile(path, args.hf_documents == "line-with-end")

    def output_files(self) -> dict[str, Kind]:
        """What a run may write."""
        files: dict[str, Kind] = {}
        for split, _ in self.splits:
            output = self._output(split)
            files |= {output + ".bin": RAW, output + ".idx": ITEMS_INDEX, output + ".progress.json": PROGRESS}
            files[output + ".json"] = description("text")
            files |= {documents_path(output): ARRAY, names_path(output): LOG}
        files[os.path.join(self.args.destdir, NAME + ".json")] = LOG
        for path in tokenizer_files(self.folder):
            files[os.path.join(self.args.destdir, FOLDER, os.path.basename(path))] = LOG
        return files

    def _output(self, split: str) -> str:
        return os.path.join(self.args.destdir, split)

    def run(self) -> None:
        """Writes the tokenizer's files, then every split that is not there yet. A folder holds texts of one tokenizer
        only."""
        destdir = self.args.destdir
        if TokenIds.described_in(destdir):
            before = TokenIds.load(destdir).tokenizer
            if before != self.digest:
                found = f"{destdir}, which holds texts of another tokenizer ({before[:12]})"
                expected = f"a folder of its own for {self.args.hf_tokenizer} ({self.digest[:12]})"
                raise BadFlag("--destdir", found, expected)
        vocabulary = copy_tokenizer(self.folder, self.tokenizer, destdir)
        logger.info("tokenizer %s: %d token ids", self.args.hf_tokenizer, len(vocabulary))
        for split, path in self.splits:
            self._write(split, path, vocabulary)

    def _made_by(self, source: DocumentFile) -> dict[str, Any]:
        """What decides every byte of a split: by it a later run knows what is finished, or can be continued."""
        args = self.args
        made: dict[str, Any] = {"file": os.path.basename(source.path), "content": file_fingerprint(source.path)}
        made |= {"tokenizer": self.digest, "tokenizers": library("tokenizers").__version__, "eos": self.eos}
        made["documents"] = source.kind
        if records_of(source.path) is not None:
            return {**made, "text_field": args.text_field or "text", "name_field": args.name_field}
        return {**made, "separator": args.document_separator}

    def _write(self, split: str, path: str, vocabulary: TokenIds) -> None:
        output, source = self._output(split), self.sources[path]
        made_by = self._made_by(source)
        if self._is_there(output, made_by):
            logger.info("%s: %s is there already, made from the same file in the same way", path, output)
            return
        writer = DocumentWriter(output, len(vocabulary), made_by, records_of(path) is not None)
        try:
            self._append_all(writer, source)
            writer.finish()
        except BadFile:  # what would fail again
            writer.abandon()
            raise
        finally:
            writer.close()
        begin, _ = added_tokens(self.tokenizer)
        added = {"eos_added": self.eos, "bos_added": begin[0] if begin == [self.tokenizer.bos_token_id] else None}
        described = {"tokenizer": self.args.hf_tokenizer, "documents_are": source.kind, "made_by": made_by}
        describe_text(output, vocabulary, {"text": {**writer.counts, **described, **added}})
        writer.done()
        self._report(source, writer.counts, writer.odd)

    @staticmethod
    def _is_there(output: str, made_by: dict[str, Any]) -> bool:
        """Whether a split is finished and as it was written."""
        try:
            if (text_counts(output) or {}).get("made_by") != made_by or not os.path.isfile(output + ".idx"):
                return False
            check_text(output)
        except UserError as error:
            logger.warning("%s; it is written again", error)
            return False
        return all(map(os.path.isfile, (output + ".bin", documents_path(output))))

    def _append_all(self, writer: DocumentWriter, source: DocumentFile) -> None:
        encoder = DocumentEncoder(self.tokenizer, self.eos, source)
        jobs = source.units(writer.position, writer.number)
        off = True if getattr(self.args, "no_progress_bar", False) else None
        bar = tqdm(total=source.size, initial=writer.position, unit=source.unit, unit_scale=True,
                   desc=os.path.basename(source.path), disable=off)
        with bar:
            pace = Pace(writer.position)
            for encoded in in_order(encoder, jobs, self.args.workers, source.path, one_thread):
                before = writer.position
                writer.append(encoded)
                bar.update(writer.position - before)
                pace.log(source, writer)

    def _report(self, source: DocumentFile, counts: dict[str, int], odd: Counter[str]) -> None:
        logger.info(
            "%s: %d documents, %d tokens, %d words, %d bytes",
            source.path, counts["documents"], counts["tokens"], counts["words"], counts["bytes"],
        )
        for kind, meaning in ODD.items():
            if odd[kind]:
                logger.warning("%s: found %d %s, %s", source.path, odd[kind], kind, meaning)
        if isinstance(source, SeparatedFile) and counts["documents"] == 1:
            logger.warning("%s: found no --document-separator, so that the whole file is one document", source.path)
        if not counts["tokens"]:
            logger.warning("%s is empty: evaluation will find nothing in this split", source.path)
