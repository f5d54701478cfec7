"""The vocabulary: symbols, their counts and their ids, and its text file `dict.txt` (one `symbol SPACE count` a line,
the four specials left out, so that line k has id `nspecial + k`). File format and ordering follow fairseq 0.9."""

from __future__ import annotations

import bisect
import io
import itertools
import logging
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch

from fairseq.data import data_utils
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.atomic_io import atomic_write
from fairseq.files.inputs import open_input, regular_size
from fairseq.tokenizer import tokenize_line

logger = logging.getLogger(__name__)

LARGEST = 1 << 30  # bytes of a dictionary: tens of millions of words
LONGEST_LINE = 1 << 20  # characters; whatever has longer ones is no dictionary
LONGEST_WORD = LONGEST_LINE - 100  # leaves room for the rest of its line
OVERWRITE_FLAG = "#fairseq:overwrite"
LARGEST_PADDING = 1 << 16
COUNT = re.compile(r"-?[0-9]{1,18}", re.ASCII)  # what 64 bits hold


class Dictionary:
    """Maps symbols to consecutive ids. `<s>`, `<pad>`, `</s>`, `<unk>` are always 0, 1, 2, 3."""

    def __init__(
        self,
        pad: str = "<pad>",
        eos: str = "</s>",
        unk: str = "<unk>",
        bos: str = "<s>",
        extra_special_symbols: list[str] | None = None,
    ) -> None:
        self.pad_word, self.eos_word, self.unk_word, self.bos_word = pad, eos, unk, bos
        self.symbols: list[str] = []
        self.count: list[int] = []
        self.indices: dict[str, int] = {}
        self.overwriting: set[int] = set()  # ids whose line in the file carries OVERWRITE_FLAG
        self.bos_index = self.add_symbol(bos)
        self.pad_index = self.add_symbol(pad)
        self.eos_index = self.add_symbol(eos)
        self.unk_index = self.add_symbol(unk)
        for symbol in extra_special_symbols or []:
            self.add_symbol(symbol)
        self.nspecial = len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.indices == other.indices

    __hash__ = object.__hash__

    def __getitem__(self, idx: int) -> str:
        return self.symbols[idx] if idx < len(self.symbols) else self.unk_word

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.indices

    def index(self, sym: str) -> int:
        """The id of `sym`, or that of unk."""
        return self.indices.get(sym, self.unk_index)

    def bos(self) -> int:
        """Id of the begin-of-sentence symbol."""
        return self.bos_index

    def pad(self) -> int:
        """Id of the padding symbol."""
        return self.pad_index

    def eos(self) -> int:
        """Id of the end-of-sentence symbol."""
        return self.eos_index

    def unk(self) -> int:
        """Id of the unknown word."""
        return self.unk_index

    def string(
        self,
        tensor: Any,
        bpe_symbol: str | None = None,
        escape_unk: bool = False,
        extra_symbols_to_ignore: set[int] | None = None,
        unk_string: str | None = None,
        include_eos: bool = False,
        separator: str = " ",
    ) -> str:
        """Joins the symbols of ids, without bos and eos; a 2-D input gives one line per row. `bpe_symbol` undoes
        sub-word segmentation (see `data_utils.post_process`)."""
        if torch.is_tensor(tensor):
            tensor = tensor.tolist()
        if len(tensor) and isinstance(tensor[0], list | np.ndarray | torch.Tensor):
            rest = (extra_symbols_to_ignore, unk_string, include_eos, separator)
            return "\n".join(self.string(row, bpe_symbol, escape_unk, *rest) for row in tensor)
        ignored = set(extra_symbols_to_ignore or ()) | {self.bos_index}
        if not include_eos:
            ignored.add(self.eos_index)
        unk = unk_string if unk_string is not None else self.unk_string(escape_unk)
        words = [unk if i == self.unk_index else self[i] for i in map(int, tensor) if i not in ignored]
        return data_utils.post_process(separator.join(words), bpe_symbol)

    def unk_string(self, escape: bool = False) -> str:
        """`<unk>`, or `<<unk>>` where it must differ from a literal one."""
        return f"<{self.unk_word}>" if escape else self.unk_word

    def add_symbol(self, word: str, n: int = 1, overwrite: bool = False) -> int:
        """Adds `n` to the count of `word`, appended if new or if `overwrite`. Returns its id."""
        idx = self.indices.get(word)
        if idx is not None and not overwrite:
            self.count[idx] += n
            return idx
        idx = self.indices[word] = len(self.symbols)
        self.symbols.append(word)
        self.count.append(n)
        return idx

    def update(self, new_dict: Dictionary) -> None:
        """Merges another dictionary: known symbols add their counts, unknown ones are appended in order."""
        for word, idx in new_dict.indices.items():
            self.add_symbol(word, new_dict.count[idx])

    def finalize(self, threshold: int = -1, nwords: int = -1, padding_factor: int = 8) -> None:
        """Sorts by descending count (ties by code point), keeps `nwords` symbols (specials included) with at least
        `threshold` occurrences, and pads with `madeupword0000`... to a multiple of `padding_factor`."""
        counts = dict(zip(self.symbols[self.nspecial :], self.count[self.nspecial :]))
        # Sorting twice is stable, reversed as well, and faster than by pairs.
        ranked = sorted(sorted(counts), key=counts.__getitem__, reverse=True)
        kept = ranked[: self.num_kept([counts[symbol] for symbol in ranked], threshold, nwords)]
        del self.symbols[self.nspecial :], self.count[self.nspecial :]
        self.overwriting = set()
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.extend(kept, [counts[symbol] for symbol in kept])
        self.pad_to_multiple_(padding_factor)

    def num_kept(self, counts: Sequence[int] | np.ndarray, threshold: int, nwords: int) -> int:
        """How many symbols with these descending counts are kept: as many as give `nwords` together with the specials
        (0 or less: all), if they occur at least `threshold` times."""
        most = len(counts) if nwords <= 0 else min(len(counts), max(0, nwords - self.nspecial))
        return bisect.bisect_right(counts, -threshold, hi=most, key=operator.neg)

    def extend(self, symbols: list[str], counts: list[int]) -> None:
        """Appends symbols that are all new; UserError for one too long for the file."""
        if symbols and (longest := max(map(len, symbols))) > LONGEST_WORD:
            raise UserError(
                f"a word of {longest} characters, expected at most {LONGEST_WORD}; put spaces between the words"
            )
        self.indices.update(zip(symbols, itertools.count(len(self.symbols))))
        self.symbols.extend(symbols)
        self.count.extend(counts)

    def pad_to_multiple_(self, padding_factor: int) -> None:
        """Appends made-up words of count 0 until the length is a multiple of `padding_factor`."""
        if padding_factor > LARGEST_PADDING:
            raise BadFlag("--padding-factor", padding_factor, f"at most {LARGEST_PADDING}", "8 is usual")
        k = 0
        while padding_factor > 1 and len(self) % padding_factor:
            self.add_symbol(f"madeupword{k:04d}", n=0)
            k += 1

    @classmethod
    def load(cls, f: str | os.PathLike[str] | IO[str], ignore_utf_errors: bool = False) -> Dictionary:
        """Reads a `dict.txt`; one-sentence errors name the line."""
        d = cls()
        d.add_from_file(f, ignore_utf_errors)
        return d

    def add_from_file(self, f: str | os.PathLike[str] | IO[str], ignore_utf_errors: bool = False) -> None:
        """Appends the entries of a `dict.txt`, neither sorting nor padding.

        A repeated symbol gets a slot of its own, and the map points to the last one, as in fairseq 0.9, with a warning;
        the later format's flag `#fairseq:overwrite` says that it is meant, and is written again by `save`."""
        if isinstance(f, str | os.PathLike):
            try:
                remedy = "give the dictionary that preprocess wrote"
                if (size := regular_size(f, remedy)) > LARGEST:
                    raise BadFile(f, f"{size} bytes", f"a dictionary of at most {LARGEST}", remedy)
                errors = "ignore" if ignore_utf_errors else "strict"
                with io.TextIOWrapper(open_input(f, remedy), encoding="utf-8", errors=errors) as stream:
                    self._add_lines(stream, os.fspath(f))
            except UnicodeDecodeError as error:
                raise BadFile(f, f"a byte that is not UTF-8 ({error.reason})", "UTF-8", "build it again") from error
        else:
            self._add_lines(f, getattr(f, "name", "dictionary"))

    def _add_lines(self, lines: IO[str], name: str) -> None:
        repeated: list[int] = []
        counts: dict[str, int] = {}  # few numbers, on many lines
        number = 0
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), start=1):
            if len(line) == LONGEST_LINE:
                found = f"more than {LONGEST_LINE} characters in line {number}"
                raise BadFile(name, found, "one `symbol count` a line", "give the dict.txt that preprocess wrote")
            symbol, space, count = line.rstrip().rpartition(" ")
            meant = count == OVERWRITE_FLAG
            if meant:
                symbol, space, count = symbol.rpartition(" ")
            value = counts.get(count) if space else None
            if value is None and space and COUNT.fullmatch(count):
                value = counts[count] = int(count)
            if value is None:
                found = repr(line.rstrip("\n")[:80])
                raise BadFile(name, f"{found} in line {number}", "`symbol count`", "build it again")
            if symbol in self.indices and not meant:
                repeated.append(number)
            idx = self.add_symbol(symbol, value, overwrite=True)
            if meant:
                self.overwriting.add(idx)
            if number == 1 and symbol.startswith("\ufeff"):
                logger.warning("%s begins with a byte order mark, which becomes part of its first symbol", name)
        if repeated:
            logger.warning(
                "%s: %d lines repeat a symbol (line %d for one); the last place counts, as in fairseq 0.9, where later "
                "versions refuse the file",
                name,
                len(repeated),
                repeated[0],
            )
        if not number:
            logger.warning("%s is empty: every word will be %s", name, self.unk_word)

    def save(self, f: str | os.PathLike[str] | IO[str]) -> None:
        """Writes `dict.txt`: every entry but the specials, atomically when given a path."""
        if isinstance(f, str | os.PathLike):
            with atomic_write(f, "w") as stream:
                stream.writelines(self._lines())
        else:
            f.writelines(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.overwriting:
            for idx in range(self.nspecial, len(self.symbols)):
                flag = f" {OVERWRITE_FLAG}" if idx in self.overwriting else ""
                yield f"{self.symbols[idx]} {self.count[idx]}{flag}\n"
            return
        start = self.nspecial
        for count, run in itertools.groupby(self.count[start:]):
            end = start + len(list(run))
            yield f" {count}\n".join([*self.symbols[start:end], ""])
            start = end

    def dummy_sentence(self, length: int) -> torch.Tensor:
        """Random words and a final eos: (length,) int64."""
        tokens = torch.randint(self.nspecial, max(len(self), self.nspecial + 1), (length,))
        tokens[-1] = self.eos_index
        return tokens

    def encode_line(
        self,
        line: str,
        line_tokenizer: Callable[[str], list[str]] = tokenize_line,
        add_if_not_exist: bool = True,
        consumer: Callable[[str, int], None] | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> torch.Tensor:
        """The ids of one line: (words + 1,) int32. `consumer(word, id)` sees each word; eos stays last if reversed."""
        words = line_tokenizer(line)
        if reverse_order:
            words = words[::-1]
        lookup = self.add_symbol if add_if_not_exist else self.index
        ids = [lookup(word) for word in words]
        if consumer is not None:
            for word, idx in zip(words, ids):
                consumer(word, idx)
        return torch.tensor(ids + [self.eos_index] if append_eos else ids, dtype=torch.int32)

    @staticmethod
    def add_file_to_dictionary(
        filename: str, dict: Dictionary, tokenize: Callable[[str], list[str]] = tokenize_line, num_workers: int = 1
    ) -> None:
        """Counts the words of a text file into `dict`, plus one eos per line. Every line counts, for any number of
        workers (fairseq 0.9 could miss the last ones)."""
        from fairseq.data.binarization import count_words

        count_words(filename, dict, tokenize, num_workers)


class TruncatedDictionary(Dictionary):
    """The first `length` entries of a dictionary; ids beyond read as unk. The rest is shared with the wrapped one."""

    def __init__(self, wrapped_dict: Dictionary, length: int) -> None:
        vars(self).update(vars(wrapped_dict))
        self.wrapped_dict = wrapped_dict
        self.length = min(len(wrapped_dict), length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, idx: int) -> str:
        return self.wrapped_dict[idx] if idx < self.length else self.unk_word
