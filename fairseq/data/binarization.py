"""Turns text into token ids by array operations: a piece of text at a time is split into words, the words are looked
up, and end-of-line tokens are added. Training text is read only once: while its words are counted they are numbered in
order of appearance, and when the dictionary is complete these numbers are replaced by ids. Parts of a file can be
processed by several processes, the first part by this one; the result is the same to the byte. File layout and counting
rules follow fairseq 0.9."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.data.text_encoder import TextEncoder, prepared
from fairseq.data.text_words import LINE_END, Words, file_size, part_offsets, read_pieces, split_words
from fairseq.data.vocabulary import Progress, Vocabulary
from fairseq.data.word_table import WordTable
from fairseq.data.workers import begin_worker, killed_worker
from fairseq.errors import UserError
from fairseq.files.atomic_io import PROCESS, discard, process_name, temporary_path, writing
from fairseq.files.output_lock import holds_lock_for
from fairseq.tokenizer import tokenize_line

LINE_END_MARK = np.iinfo(np.int32).max  # temporary id of a line end, which is replaced by eos
SMALLEST_PART = 1 << 20  # bytes; smaller parts are not worth a process
SMALLEST_ENCODED_PART = 1 << 14  # the same where an encoder processes one line at a time
COPY_STEP = 1 << 16  # tokens copied at a time when parts are joined, so that they fit in the cache


@dataclass
class Summary:
    """Counts of a text: lines, tokens (with end-of-line), words replaced by unk, and odd characters by kind."""

    nseq: int = 0
    ntok: int = 0
    nunk: int = 0
    odd: Counter[str] = field(default_factory=Counter)

    def add(self, other: Summary) -> None:
        """Adds the counts of another part."""
        self.nseq, self.ntok, self.nunk = self.nseq + other.nseq, self.ntok + other.ntok, self.nunk + other.nunk
        self.odd.update(other.odd)


class Encoder:
    """Encodes text with a fixed dictionary; `summary` counts what was encoded so far. `encoder` cuts raw text first."""

    def __init__(
        self,
        dictionary: Dictionary,
        append_eos: bool = True,
        reverse_order: bool = False,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.append_eos, self.reverse_order, self.encoder = append_eos, reverse_order, encoder
        self.summary = Summary()
        self._eos, self._unk = dictionary.eos(), dictionary.unk()
        self._table = WordTable()
        self._table.find_or_add(Words.from_list([LINE_END]))
        symbols = [word for word in dictionary.indices if word]
        labels = np.empty(len(symbols) + 1, dtype=np.int32)
        labels[self._table.find_or_add(Words.from_strings(symbols))] = [dictionary.indices[word] for word in symbols]
        labels[0] = LINE_END_MARK
        self._table.relabel(labels)

    def encode_file(
        self,
        path: str,
        start: int = 0,
        end: int | None = None,
        whole_lines: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields int32 ids and the int32 sizes of the lines that end among them; a long line may span several."""
        open_line = 0
        whole_lines = whole_lines or self.reverse_order or self.encoder is not None
        for text in read_pieces(path, start, end, whole_lines):
            tokens = self._table.find(split_words(prepared(text, self.encoder, self.summary.odd)))
            ends = np.flatnonzero(tokens == LINE_END_MARK)
            if self.append_eos:
                tokens[ends] = self._eos
                ends += 1
            else:
                tokens = np.delete(tokens, ends)
                ends -= np.arange(len(ends))
            unknown = tokens < 0
            tokens[unknown] = self._unk
            sizes = np.diff(ends, prepend=-open_line).astype(np.int32)
            open_line = len(tokens) - int(ends[-1]) if len(ends) else open_line + len(tokens)
            self.summary.add(Summary(len(sizes), len(tokens), int(np.count_nonzero(unknown))))
            yield (self._reverse(tokens, sizes) if self.reverse_order else tokens), sizes
            if progress is not None:
                progress(len(text))

    def _reverse(self, tokens: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Reverses the words of each line; its eos stays last."""
        words = np.repeat(sizes - int(self.append_eos), sizes)
        begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
        position = np.arange(len(tokens)) - begin
        return tokens[begin + np.where(position < words, words - 1 - position, position)]


def _pieces(prefix: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads scratch files back: tokens in steps, then all sizes."""
    empty = np.empty(0, dtype=np.int32)
    for name in (".tokens", ".sizes"):
        with open(prefix + name, "rb") as stream:
            while len(values := np.frombuffer(stream.read(4 * COPY_STEP), dtype=np.int32)):
                yield (values, empty) if name == ".tokens" else (empty, values)


def _spool(prefix: str | None, pieces: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes tokens and sizes to scratch files, or only runs through them."""
    if prefix is None:
        for _ in pieces:
            pass
        return
    names = [prefix + ".tokens", prefix + ".sizes"]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
    with writing(prefix), open(names[0], "xb") as tokens_file, open(names[1], "xb") as sizes_file:
        for tokens, sizes in pieces:
            tokens_file.write(tokens.data)
            sizes_file.write(sizes.data)


def _number_part(
    path: str, start: int, end: int, prefix: str | None, encoder: TextEncoder | None
) -> tuple[Words, np.ndarray, Counter[str]]:
    vocabulary = Vocabulary(encoder)
    _spool(prefix, vocabulary.number_file(path, start, end))
    return vocabulary.contents()


def _encode_part(path: str, start: int, end: int, prefix: str | None, encoder: Encoder) -> Summary:
    _spool(prefix, encoder.encode_file(path, start, end))
    return encoder.summary


def _worker(answers: Connection, work: Callable[..., Any], *args: Any) -> None:
    """The main function of a worker process: sends the result of `work`, or the message of a UserError or OSError."""
    begin_worker()
    try:
        answers.send(work(*args))
    except UserError as error:
        answers.send(str(error))
    except OSError as error:
        answers.send(error)


def _scratch_prefix(prefix: str | None, part: int) -> str | None:
    return None if prefix is None else str(temporary_path(f"{prefix}.part{part}"))


@contextlib.contextmanager
def _helped(
    work: Callable[..., Any],
    path: str,
    workers: int,
    prefix: str | None,
    progress: Progress | None,
    extra: Any,
    smallest: int = SMALLEST_PART,
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Divides a file among `workers` processes (fewer if parts had less than `smallest` bytes). Yields the end of the
    first part, which this process works on, and the results of `work` for the other parts, in order, which other
    processes compute in the meantime."""
    offsets = part_offsets(path, max(1, min(workers, file_size(path) // smallest)))
    processes, answers = [], []
    for k, (start, end) in enumerate(zip(offsets[1:], offsets[2:]), start=1):
        answer, sender = Pipe(duplex=False)
        args = (sender, work, path, start, end, _scratch_prefix(prefix, k), extra)
        processes.append(Process(target=_worker, args=args, daemon=True))
        processes[-1].start()
        sender.close()  # so that a worker's death ends the pipe
        answers.append(answer)

    def results() -> Iterator[Any]:
        for answer, start, end in zip(answers, offsets[1:], offsets[2:]):
            try:
                result = answer.recv()
            except EOFError:
                raise killed_worker(path) from None
            if isinstance(result, OSError):
                raise result
            if isinstance(result, str):
                raise UserError(result)
            yield result
            if progress is not None:
                progress(end - start)

    try:
        yield offsets[1], results()
    finally:
        for process, answer in zip(processes, answers):
            answer.close()
            process.terminate()  # one that still works: something went wrong elsewhere
            process.join()


@contextlib.contextmanager
def _scratch(prefix: str) -> Iterator[None]:
    """Removes the scratch files of all parts at the end, including those of killed runs."""
    try:
        yield
    finally:
        discard(_scratch_files(prefix))


def _scratch_files(prefix: str) -> list[Path]:
    """The scratch files of this process; those of killed ones too, where the lock of the output keeps others away."""
    path, everyone = Path(prefix), holds_lock_for(prefix)
    pattern = re.compile(re.escape(path.name) + rf"\.part[0-9]+\.({PROCESS})\.tmp\.(tokens|sizes)")
    matches = [match for match in map(pattern.fullmatch, os.listdir(path.parent)) if match]
    return [path.with_name(match[0]) for match in matches if everyone or match[1] == process_name()]


class NumberedText:
    """A text file whose words were numbered and counted, waiting for its dictionary. Use as a context manager: the
    scratch files beside `prefix` (four bytes a token; none if `prefix` is None) go away at the end. `encoder` cuts raw
    text first."""

    def __init__(
        self,
        path: str,
        prefix: str | None,
        workers: int = 1,
        progress: Progress | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.prefix = prefix
        self.vocabulary = Vocabulary(encoder)
        self._numbers: list[np.ndarray] = []  # of each further part's words in the vocabulary
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            if prefix is not None:
                stack.enter_context(_scratch(prefix))
            with _helped(_number_part, path, workers, prefix, progress, encoder, _smallest(encoder)) as (end, others):
                _spool(_scratch_prefix(prefix, 0), self.vocabulary.number_file(path, 0, end, progress))
                self._numbers = [self.vocabulary.merge(*part) for part in others]
            self._cleanup = stack.pop_all()

    def __enter__(self) -> NumberedText:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def write(self, builder: Any, dictionary: Dictionary) -> Summary:
        """Adds the text to a dataset builder, words as ids of `dictionary`. Returns the counts."""
        if self.prefix is None:
            raise ValueError("this text was only counted")
        ids, unknown = self.vocabulary.ids(dictionary)
        for part, part_ids in enumerate([ids, *(ids[numbers] for numbers in self._numbers)]):
            for numbers, sizes in _pieces(str(temporary_path(f"{self.prefix}.part{part}"))):
                builder.add_items(part_ids.take(numbers), sizes)
        counts = self.vocabulary.counts()
        return Summary(int(counts[0]), int(counts.sum()), unknown, Counter(self.vocabulary.odd))


def _smallest(encoder: TextEncoder | None) -> int:
    return SMALLEST_PART if encoder is None else SMALLEST_ENCODED_PART


def binarize_file(
    path: str,
    prefix: str,
    dictionary: Dictionary,
    builder: Any,
    workers: int = 1,
    progress: Progress | None = None,
    text_encoder: TextEncoder | None = None,
) -> Summary:
    """Adds a text file to a dataset builder. Several workers leave scratch files beside `prefix` meanwhile."""
    encoder = Encoder(dictionary, encoder=text_encoder)
    helped = _helped(_encode_part, path, workers, prefix, progress, encoder, _smallest(text_encoder))
    with _scratch(prefix), helped as (end, others):
        for ids, sizes in encoder.encode_file(path, 0, end, progress=progress):
            builder.add_items(ids, sizes)
        for part, summary in enumerate(others, start=1):
            for ids, sizes in _pieces(str(temporary_path(f"{prefix}.part{part}"))):
                builder.add_items(ids, sizes)
            encoder.summary.add(summary)
    return encoder.summary


def count_words(
    filename: str,
    dictionary: Dictionary,
    tokenize: Callable[[str], Sequence[str]] = tokenize_line,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Counts a text file's words into `dictionary`, and one eos per line; new words are appended in sorted order."""
    counts: Counter[str] = Counter()
    if tokenize is tokenize_line:
        with NumberedText(filename, None, num_workers, progress) as text:
            vocabulary = text.vocabulary
        lines, *rest = vocabulary.counts().tolist()
        counts.update(dict(zip(vocabulary.table.strings(np.arange(1, len(rest) + 1)), rest)))
        counts[dictionary.eos_word] += lines
    else:
        for line in _lines(filename, 0, None):
            counts.update([*tokenize(line), dictionary.eos_word])
    for word, count in sorted(counts.items()):
        dictionary.add_symbol(word, count)


def _lines(path: str, start: int, end: int | None) -> Iterator[str]:
    """The text lines in bytes [start, end) of a file, without their line ends."""
    for text in read_pieces(path, start, end, whole_lines=True):
        lines = text.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from lines[:-1]


class Binarizer:
    """fairseq's interface: calls a function with the ids of each line. `binarize_file` does whole files much faster."""

    @staticmethod
    def binarize(
        filename: str,
        dict: Dictionary,
        consumer: Callable[[torch.Tensor], Any],
        tokenize: Callable[[str], list[str]] = tokenize_line,
        append_eos: bool = True,
        reverse_order: bool = False,
        offset: int = 0,
        end: int = -1,
        already_numberized: bool = False,
    ) -> Any:
        """Encodes the lines in bytes [offset, end) of a file (-1 or 0: to its end; both must be line starts).

        Returns `nseq`, `ntok`, `nunk` and the Counter `replaced` of the words that became unk."""
        replaced: Counter[str] = Counter()
        nseq = ntok = 0

        def note(word: str, idx: int) -> None:
            if idx == dict.unk_index and word != dict.unk_word:
                replaced[word] += 1

        for line in _lines(filename, offset, end if end > 0 else None):
            if already_numberized:
                ids = [int(word) for word in tokenize(line)]
                ids = ids[::-1] if reverse_order else ids
                tensor = torch.tensor(ids + [dict.eos()] if append_eos else ids, dtype=torch.int32)
            else:
                tensor = dict.encode_line(line, tokenize, False, note, append_eos, reverse_order)
            nseq, ntok = nseq + 1, ntok + len(tensor)
            consumer(tensor)
        return {"nseq": nseq, "nunk": sum(replaced.values()), "ntok": ntok, "replaced": replaced}

    @staticmethod
    def binarize_alignments(
        filename: str,
        alignment_parser: Callable[[str], torch.Tensor],
        consumer: Callable[[torch.Tensor], Any],
        offset: int = 0,
        end: int = -1,
    ) -> dict[str, int]:
        """Calls `consumer` with the parsed alignment of each line. Returns `nseq`."""
        nseq = 0
        for line in _lines(filename, offset, end if end > 0 else None):
            consumer(alignment_parser(line))
            nseq += 1
        return {"nseq": nseq}

    @staticmethod
    def find_offsets(filename: str, num_chunks: int) -> list[int]:
        """Where `num_chunks` parts of a file begin, each at a line start; the last entry, 0, is fairseq's end mark."""
        return [*part_offsets(filename, num_chunks)[:-1], 0]


def parse_alignment(line: str) -> torch.Tensor:
    """`0-0 1-2` as (0, 0, 1, 2), int32."""
    try:
        pairs = [[int(i) for i in pair.split("-")] for pair in line.split()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except ValueError:
        raise UserError(f"alignment line {line[:80]!r}: expected pairs such as 0-0 1-2") from None
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1)
