"""The words of a training text before its dictionary is complete: they are numbered in order of appearance, counted,
merged with those of the text's other parts, and finally ranked. Only words in the dictionary become Python strings;
everything else is done by array operations on the words' bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fairseq.data.dictionary import Dictionary
from fairseq.data.text_encoder import TextEncoder, prepared
from fairseq.data.text_words import LINE_END, Words, read_pieces, split_words
from fairseq.data.word_table import WordTable

COUNTED_AT_ONCE = 1 << 18  # tokens counted at a time, because each count costs a pass over the vocabulary

Progress = Callable[[int], Any]


class Vocabulary:
    """Words, their numbers and their counts. Number 0 is the line end. `odd` counts odd characters of the text."""

    def __init__(self, encoder: TextEncoder | None = None) -> None:
        self.encoder, self.odd = encoder, Counter[str]()
        self.table = WordTable()
        self.table.find_or_add(Words.from_list([LINE_END]))
        self._counts = np.zeros(1, dtype=np.int64)
        self._uncounted: list[np.ndarray] = []

    def number_file(
        self, path: str, start: int = 0, end: int | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields int32 word numbers, with 0 at line ends, and the int32 sizes of the lines that end among them."""
        open_line = 0
        for text in read_pieces(path, start, end, whole_lines=self.encoder is not None):
            tokens = self.table.find_or_add(split_words(prepared(text, self.encoder, self.odd)))
            ends = np.flatnonzero(tokens == 0) + 1
            sizes = np.diff(ends, prepend=-open_line).astype(np.int32)
            open_line = len(tokens) - int(ends[-1]) if len(ends) else open_line + len(tokens)
            self._uncounted.append(tokens)
            if sum(map(len, self._uncounted)) > max(COUNTED_AT_ONCE, len(self.table)):
                self.counts()
            yield tokens, sizes
            if progress is not None:
                progress(len(text))

    def counts(self) -> np.ndarray:
        """Occurrences of each word: (words,) int64."""
        counts = np.bincount(np.concatenate([np.empty(0, np.int32), *self._uncounted]), minlength=len(self.table))
        counts[: len(self._counts)] += self._counts
        self._counts, self._uncounted = counts, []
        return counts

    def contents(self) -> tuple[Words, np.ndarray, Counter[str]]:
        """All words in the order of their numbers, their counts, and `odd`: for `merge` in another process."""
        return self.table.words(np.arange(len(self.table))), self.counts(), self.odd

    def merge(self, words: Words, counts: np.ndarray, odd: Counter[str]) -> np.ndarray:
        """Adds distinct words with their counts. Returns their numbers here: (words,) int32."""
        self.odd.update(odd)
        numbers = self.table.find_or_add(words)
        self.counts()[numbers] += counts
        return numbers

    def ids(self, dictionary: Dictionary) -> tuple[np.ndarray, int]:
        """The id of every number in a dictionary: (words,) int32; and how many tokens unk replaces."""
        numbers = self.table.find(Words.from_strings(dictionary.symbols))
        present = np.flatnonzero(numbers >= 0)
        ids = np.full(len(self.table), dictionary.unk(), dtype=np.int32)
        ids[numbers[present]] = present
        ids[0] = dictionary.eos()
        replaced = ids == dictionary.unk()
        if (unk := numbers[dictionary.unk()]) >= 0:
            replaced[unk] = False
        return ids, int(self.counts()[replaced].sum())


def build_dictionary(
    vocabularies: Sequence[Vocabulary], threshold: int = -1, nwords: int = -1, padding_factor: int = 8
) -> Dictionary:
    """The dictionary of several texts, with one end-of-sentence per line: as `Dictionary.finalize` makes it of their
    words."""
    vocabulary = vocabularies[0]
    if len(vocabularies) > 1:
        vocabulary = Vocabulary()
        for other in vocabularies:
            vocabulary.merge(*other.contents())
    dictionary, counts = Dictionary(), vocabulary.counts()
    dictionary.count[dictionary.eos()] += int(counts[0])
    listed = np.zeros(len(counts), dtype=bool)
    listed[0] = True
    for idx, number in enumerate(vocabulary.table.find(Words.from_strings(dictionary.symbols)).tolist()):
        if number >= 0:
            dictionary.count[idx] += int(counts[number])
            listed[number] = True
    words = vocabulary.table.alphabetical()
    words = words[~listed[words]]
    words = words[np.argsort(-counts[words], kind="stable")]
    words = words[: dictionary.num_kept(counts[words], threshold, nwords)]
    dictionary.extend(vocabulary.table.strings(words), counts[words].tolist())
    dictionary.pad_to_multiple_(padding_factor)
    return dictionary
