"""A hash table from words to consecutive ids that looks up a whole array of words at once.

Words are compared exactly, as one to four numbers of eight bytes (padded with NUL), each count of numbers in a table of
its own with open addressing; the few longer words, or words that contain NUL, are in a Python dictionary. Ten times
as fast as a dictionary look-up per word, since every step is an array operation over all words of a piece of text."""

from __future__ import annotations

import numpy as np

from fairseq.data.text_words import LINE_END, PADDING, Words

WIDTHS = (1, 2, 3, 4)
HEAD = 8 * len(WIDTHS)  # bytes
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
# _KEEP[n] keeps the first n bytes of a little-endian number.
_KEEP = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)


class _FixedWidthTable:
    """Words of 8 * (width - 1) + 1 to 8 * width bytes. A key is a list of `width` uint64 arrays, one entry a word.

    No word is all NUL, so a slot whose key is zero is free."""

    def __init__(self, width: int, bits: int = 12) -> None:
        self.width, self.bits, self.used = width, bits, 0
        self.keys = [np.zeros(1 << bits, dtype=np.uint64) for _ in range(width)]
        self.ids = np.full(1 << bits, -1, dtype=np.int32)

    def _slots(self, keys: list[np.ndarray]) -> np.ndarray:
        mixed = keys[0] * _MULTIPLIER
        for key in keys[1:]:
            mixed = ((mixed >> np.uint64(32)) ^ mixed ^ key) * _MULTIPLIER
        return (mixed >> np.uint64(64 - self.bits)).astype(np.int64)

    def _same(self, slots: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        same = self.keys[0][slots] == keys[0]
        for stored, key in zip(self.keys[1:], keys[1:]):
            same &= stored[slots] == key
        return same

    def find(self, keys: list[np.ndarray]) -> np.ndarray:
        """Ids of the words, -1 where unknown."""
        slots = self._slots(keys)
        same = self._same(slots, keys)
        found = self.ids[slots]
        result = np.where(same, found, np.int32(-1))
        todo = np.flatnonzero(~same & (found >= 0))  # the slot is another word's: look in the next
        mask = (1 << self.bits) - 1
        slots = slots[todo]
        step = 0
        while len(todo):
            step += 1
            slots = (slots + step) & mask
            found = self.ids[slots]
            same = self._same(slots, [key[todo] for key in keys])
            result[todo[same]] = found[same]
            on = ~same & (found >= 0)
            todo, slots = todo[on], slots[on]
        return result

    def add(self, keys: list[np.ndarray], first_id: int) -> np.ndarray:
        """Ids of unknown words (any of them several times), numbered from `first_id`."""
        bits = (2 * (self.used + len(keys[0]))).bit_length()
        if bits > self.bits:
            self._grow(bits)
        return self._place(keys, first_id, None)

    def _place(self, keys: list[np.ndarray], first_id: int, given: np.ndarray | None) -> np.ndarray:
        """Puts words into free slots with new ids, or with the `given` ones."""
        result = np.empty(len(keys[0]), dtype=np.int32)
        todo = np.arange(len(result), dtype=np.int32)
        slots = self._slots(keys)
        step = 0
        while len(todo):
            # Several words may want one free slot: all write their number, the one that is read back has won. That is
            # the last written, so the first comes last: early words are frequent and should be found at once.
            free = self.ids[slots] < 0
            claimants, wanted = todo[free], slots[free]
            self.ids[wanted[::-1]] = claimants[::-1]
            won = self.ids[wanted] == claimants
            winners, taken = claimants[won], wanted[won]
            new = np.arange(first_id, first_id + len(winners), dtype=np.int32)
            self.ids[taken] = new if given is None else given[winners]
            for stored, key in zip(self.keys, keys):
                stored[taken] = key[winners]
            first_id += len(winners)
            self.used += len(winners)
            same = self._same(slots, [key[todo] for key in keys])
            result[todo[same]] = self.ids[slots[same]]
            step += 1
            todo, slots = todo[~same], (slots[~same] + step) & ((1 << self.bits) - 1)
        return result

    def _grow(self, bits: int) -> None:
        full = self.ids >= 0
        keys, ids = [key[full] for key in self.keys], self.ids[full]
        self.__init__(self.width, bits)  # type: ignore[misc]
        self._place(keys, 0, ids)


class WordTable:
    """Words and their ids 0, 1, 2, ... in order of insertion (within one call: in no particular order)."""

    def __init__(self) -> None:
        self.size = 0
        self._tables = {width: _FixedWidthTable(width) for width in WIDTHS}
        self._others: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self.size

    def find(self, words: Words) -> np.ndarray:
        """The ids of words: (n,) int32, -1 where unknown."""
        return self._look_up(words, insert=False)

    def find_or_add(self, words: Words) -> np.ndarray:
        """The ids of words: (n,) int32; unknown words get the next ids."""
        return self._look_up(words, insert=True)

    def _look_up(self, words: Words, insert: bool) -> np.ndarray:
        result = np.full(len(words.starts), -1, dtype=np.int32)
        numbers = np.ndarray((max(0, len(words.buffer) - 7),), "<u8", words.buffer, strides=(1,))
        widths = (words.lengths + 7) >> 3
        nul = np.flatnonzero(words.buffer[:-PADDING] == 0)
        if len(nul):
            widths[np.searchsorted(words.starts, nul, side="right") - 1] = WIDTHS[-1] + 1
        for width, table in self._tables.items():
            at = np.flatnonzero(widths == width)
            if not len(at):
                continue
            starts, lengths = words.starts[at], words.lengths[at]
            keys = [numbers[starts + 8 * j] for j in range(width)]
            keys[-1] &= _KEEP[lengths - 8 * (width - 1)]
            ids = table.find(keys)
            new = np.flatnonzero(ids < 0) if insert else ()
            if len(new):
                before = table.used
                ids[new] = table.add([key[new] for key in keys], self.size)
                self.size += table.used - before
            result[at] = ids
        for i in np.flatnonzero(widths > WIDTHS[-1]).tolist():
            start = int(words.starts[i])
            word = words.buffer[start : start + int(words.lengths[i])].tobytes()
            if insert and word not in self._others:
                self._others[word] = self.size
                self.size += 1
            result[i] = self._others.get(word, -1)
        return result

    def relabel(self, labels: np.ndarray) -> None:
        """Makes labels[i] (not negative) the id of word i. No words can be added afterwards."""
        for table in self._tables.values():
            full = table.ids >= 0
            table.ids[full] = labels[table.ids[full]]
        self._others = {word: int(labels[idx]) for word, idx in self._others.items()}

    def _heads(self) -> np.ndarray:
        """The first `HEAD` bytes of every word, padded with NUL, as four numbers: (words, 4) little-endian uint64."""
        heads = np.zeros((self.size, len(WIDTHS)), dtype="<u8")
        for table in self._tables.values():
            full = np.flatnonzero(table.ids >= 0)
            ids = table.ids[full]
            for j, key in enumerate(table.keys):
                heads[ids, j] = key[full]
        for word, idx in self._others.items():
            heads[idx] = np.frombuffer(word[:HEAD].ljust(HEAD, b"\0"), "<u8")
        return heads

    def alphabetical(self) -> np.ndarray:
        """All ids in the order of the words' bytes, which is that of code points: (words,) int64."""
        # Of words with the same head, the one in the arrays comes first; the longer ones follow it.
        ties = np.zeros(self.size, dtype=np.int32)
        for place, word in enumerate(sorted(self._others), start=1):
            ties[self._others[word]] = place
        return np.lexsort((ties, *self._heads().view(">u8").astype(np.uint64).T[::-1]))

    def words(self, ids: np.ndarray) -> Words:
        """The words with these ids, a line end behind each."""
        heads = self._heads()[ids]
        lengths = np.char.str_len(heads.view(f"S{HEAD}")[:, 0]).astype(np.int64)
        by_id = {idx: word for word, idx in self._others.items()}
        others = {i: by_id[int(ids[i])] for i in np.flatnonzero(np.isin(ids, list(by_id))).tolist()}
        for i, word in others.items():
            lengths[i] = len(word)
        ends = np.cumsum(lengths + 1)
        starts = ends - lengths - 1
        buffer = np.zeros(int(np.sum(lengths + 1)) + PADDING, dtype=np.uint8)
        numbers = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))
        # The last number of a word spoils up to seven bytes behind it. They belong to beginnings of words, so these are
        # written last and from left to right.
        for j in reversed(range(len(WIDTHS))):
            at = np.flatnonzero(lengths > 8 * j)
            numbers[starts[at] + 8 * j] = heads[at, j]
        for i, word in others.items():
            buffer[starts[i] :][: len(word)] = np.frombuffer(word, dtype=np.uint8)
        buffer[ends - 1] = LINE_END[0]
        return Words(buffer, starts, lengths)

    def strings(self, ids: np.ndarray) -> list[str]:
        """The words with these ids as text; none may be a line end."""
        return self.words(ids).buffer[:-PADDING].tobytes().decode().split("\n")[:-1]
