"""Text files to token ids by a Hugging Face tokenizer: `.bin`/`.idx` as fairseq's, an item a document, and a sidecar
with what perplexities of words and bytes need."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from fairseq.data.indexed_dataset import make_builder
from fairseq.data.text_description import describe_text
from fairseq.data.token_ids import FOLDER, NAME, TokenIds
from fairseq.errors import BadFile, BadFlag, MissingFile
from fairseq.files.inputs import open_input
from fairseq.files.outputs import ITEMS_INDEX, LOG, RAW, Kind
from fairseq.models.huggingface.folders import resolve
from fairseq.models.huggingface.tokenizers import copy_tokenizer, open_tokenizer, tokenizer_digest, tokenizer_files

logger = logging.getLogger(__name__)

DOCUMENTS = ("line", "line-with-end", "file")
BATCH_BYTES = 1 << 20  # of text that is encoded in one call
SPACES = re.compile(r"\s+")


class TokenizedText:
    """One run of preprocess with `--hf-tokenizer`. args: its flags; splits: (name, path of a text file)."""

    def __init__(self, args: argparse.Namespace, splits: list[tuple[str, str]]) -> None:
        self.args, self.splits = args, splits
        self._refuse_flags()
        for _, path in splits:
            if not os.path.isfile(path):
                raise MissingFile(path, "check --trainpref, --validpref and --testpref")
        self.folder = resolve(args.hf_tokenizer, "--hf-tokenizer", weights=False)
        self.tokenizer = open_tokenizer(self.folder)
        self.eos = self.tokenizer.eos_token_id if args.hf_eos == "document" else None
        if args.hf_eos == "document" and self.eos is None:
            remedy = "give --hf-eos none, and score in windows with --max-length"
            raise BadFile(self.folder, "a tokenizer without EOS", "one that has it, to end documents", remedy)

    def _refuse_flags(self) -> None:
        args = self.args
        if not args.only_source or args.source_lang or args.target_lang:
            raise BadFlag("--hf-tokenizer", "a text with languages", "--only-source, and no language")
        if not self.splits:
            raise BadFlag("--trainpref", "nothing", "a text, here or in --validpref or --testpref")
        if args.dataset_impl != "mmap":
            raise BadFlag("--dataset-impl", args.dataset_impl, "mmap with --hf-tokenizer")
        for name in ("srcdict", "tgtdict", "joined_dictionary", "dict_only", "align_suffix", "tokenizer", "bpe"):
            if getattr(args, name, None):
                flag = "--" + name.replace("_", "-")
                raise BadFlag(flag, getattr(args, name), "nothing with --hf-tokenizer, which brings words of its own")
        if os.path.exists(os.path.join(args.destdir, "dict.txt")):
            raise BadFlag("--destdir", f"{args.destdir}, which holds a text of words", "a folder of its own")

    def output_files(self) -> dict[str, Kind]:
        """What a run may write."""
        files = {self._output(split) + ending: kind for split, _ in self.splits
                 for ending, kind in ((".bin", RAW), (".idx", ITEMS_INDEX))}
        files[os.path.join(self.args.destdir, NAME + ".json")] = LOG
        for path in tokenizer_files(self.folder):
            files[os.path.join(self.args.destdir, FOLDER, os.path.basename(path))] = LOG
        return files

    def _output(self, split: str) -> str:
        return os.path.join(self.args.destdir, split)

    def run(self) -> None:
        """Writes every split, then the tokenizer's files. A folder holds texts of one tokenizer only."""
        destdir = self.args.destdir
        if TokenIds.described_in(destdir):
            before, now = TokenIds.load(destdir).tokenizer, tokenizer_digest(self.tokenizer)
            if before != now:
                found = f"{destdir}, which holds texts of another tokenizer ({before[:12]})"
                raise BadFlag("--destdir", found, f"a folder of its own for {self.args.hf_tokenizer} ({now[:12]})")
        vocabulary = copy_tokenizer(self.folder, self.tokenizer, destdir)
        logger.info("tokenizer %s: %d token ids", self.args.hf_tokenizer, len(vocabulary))
        for split, path in self.splits:
            self._write(split, path, vocabulary)

    def _write(self, split: str, path: str, vocabulary: TokenIds) -> None:
        output = self._output(split)
        builder = make_builder(output + ".bin", "mmap", len(vocabulary))
        counts = dict.fromkeys(("documents", "tokens", "bytes", "words", "split_words"), 0)
        try:
            for documents in self._batches(path):
                flat, lengths = self._encode(documents, path)
                builder.add_items(flat, lengths)
                texts = [document.encode("utf-8") for document in documents]
                counts["documents"] += len(documents)
                counts["tokens"] += len(flat)
                counts["bytes"] += sum(map(len, texts))
                counts["words"] += sum(len(document.split()) for document in documents)
                counts["split_words"] += sum(len(SPACES.split(document)) for document in documents)
            builder.finalize(output + ".idx")
        except BaseException:
            builder.abandon()
            raise
        treatment = {"tokenizer": self.args.hf_tokenizer, "documents_are": self.args.hf_documents}
        ends = {"eos_added": self.eos, "bos_added": self._bos_added()}
        describe_text(output, vocabulary, {"text": {**counts, **treatment, **ends}})
        logger.info(
            "%s: %d documents, %d tokens, %d words, %d bytes",
            path, counts["documents"], counts["tokens"], counts["words"], counts["bytes"],
        )
        if not counts["tokens"]:
            logger.warning("%s is empty: evaluation will find nothing in this split", path)

    def _bos_added(self) -> int | None:
        """The token that the tokenizer itself puts before each document, if any."""
        ids = self.tokenizer("a")["input_ids"]
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    def _encode(self, documents: list[str], path: str) -> tuple[np.ndarray, np.ndarray]:
        """All tokens (n,) int64 of some documents, and how many each has."""
        encoded = self.tokenizer(documents, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        ids = encoded["input_ids"]
        if self.eos is not None:
            ids = [[*document, self.eos] for document in ids]
        lengths = np.array([len(document) for document in ids], np.int64)
        flat = np.fromiter((token for document in ids for token in document), np.int64, int(lengths.sum()))
        return flat, lengths

    def _batches(self, path: str) -> Iterator[list[str]]:
        """Documents in batches, with a bar over the bytes of the file."""
        off = True if getattr(self.args, "no_progress_bar", False) else None
        with open_input(path) as stream, tqdm(
            total=os.path.getsize(path), unit="B", unit_scale=True, desc=os.path.basename(path), disable=off
        ) as bar:
            if self.args.hf_documents == "file":
                data = stream.read()
                yield [self._text(data, path)] if data else []
                bar.update(len(data))
                return
            batch, size = [], 0
            with_end = self.args.hf_documents == "line-with-end"
            for line in stream:
                kept = line if with_end else line.removesuffix(b"\n").removesuffix(b"\r")
                batch.append(self._text(kept, path))
                size += len(line)
                if size >= BATCH_BYTES:
                    yield batch
                    bar.update(size)
                    batch, size = [], 0
            if batch:
                yield batch
                bar.update(size)

    @staticmethod
    def _text(data: bytes, path: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"bytes that are no UTF-8 ({error.reason})"
            raise BadFile(path, found, "text in UTF-8", "convert it, with iconv for example") from None
