"""Counting and perplexity: pieces merged into words, totals in float64, and the optional
reports of words and their log-probabilities."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.errors import BadFlag

logger = logging.getLogger(__name__)


def continuation_mask(dictionary: Any, marker: str | None) -> NDArray[np.bool_] | None:
    """(V,) bool: which symbols are pieces that go on, by the marker of `--remove-bpe` ("@@ "); None without a
    marker."""
    if marker is None:
        return None
    if marker == "sentencepiece":
        raise BadFlag("--remove-bpe", marker, "a marker at the end of pieces such as '@@ '")
    suffix = "@@" if marker == "subword_nmt" else marker.rstrip()
    return np.array([dictionary[index].endswith(suffix) for index in range(len(dictionary))])


@dataclass
class Totals:
    """Sum of log-probabilities in nats (float64) and the number of scored words."""

    log_prob: float = 0.0
    count: int = 0

    @property
    def loss_base2(self) -> float:
        """Mean loss in bits per counted word."""
        return -self.log_prob / self.count / math.log(2) if self.count else float("nan")

    @property
    def perplexity(self) -> float:
        """2 to the power of the loss."""
        try:
            return 2**self.loss_base2
        except OverflowError:
            return float("inf")


class WordAccounting:
    """Adds up samples. `report_words` logs each sample's words; `collect_stats` gathers statistics per word."""

    def __init__(
        self, dictionary: Any, marker: str | None = None, report_words: bool = False, collect_stats: bool = False
    ) -> None:
        self.dictionary = dictionary
        self.marker_length = 0 if marker is None else len("@@" if marker == "subword_nmt" else marker.rstrip())
        self.continues = continuation_mask(dictionary, marker)
        self.report_words = report_words
        self.stats: dict[str, WordStat] | None = {} if collect_stats else None
        self.totals = Totals()

    def add(self, sample_id: int, tokens: NDArray[np.int64], log_probs: NDArray[np.float32]) -> None:
        """Adds one sample: tokens (T,) and their log-probabilities (T,) in nats."""
        if not len(tokens):
            return
        ends = self.word_ends(tokens)
        starts = np.concatenate([[0], ends[:-1] + 1])
        words = np.add.reduceat(log_probs.astype(np.float64), starts)
        self.totals.log_prob += float(words.sum())
        self.totals.count += len(ends)
        if self.report_words or self.stats is not None:
            self._report(sample_id, tokens, starts, ends, words)

    def word_ends(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions at which a word ends. A piece that goes on but is the sample's last token counts as a word."""
        if self.continues is None:
            return np.arange(len(tokens))
        goes_on = self.continues[tokens]
        goes_on[-1] = False
        return np.flatnonzero(~goes_on)

    def counted(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(T,): whether a counted word ends at each of a sample's tokens."""
        ends = np.zeros(len(tokens), bool)
        if len(tokens):
            ends[self.word_ends(tokens)] = True
        return ends

    def _report(
        self,
        sample_id: int,
        tokens: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        log_probs: NDArray[np.float64],
    ) -> None:
        symbols = [self.dictionary[int(token)] for token in tokens]
        if self.continues is not None:
            cut = [symbol[: -self.marker_length] for symbol in symbols]
            going_on = self.continues[tokens]
            symbols = [short if on else symbol for short, symbol, on in zip(cut, symbols, going_on, strict=True)]
            unfinished = bool(going_on[-1])
        else:
            unfinished = False
        words = ["".join(symbols[start : end + 1]) for start, end in zip(starts, ends, strict=True)]
        shown = words[:-1] if unfinished else words
        if self.report_words:
            pairs = "\t".join(f"{word} [{lp:.6f}]" for word, lp in zip(shown, log_probs.tolist(), strict=False))
            logger.info("%d %s", sample_id, pairs)
        if self.stats is not None:
            following = [*log_probs.tolist()[1:], None]
            pieces = (ends > starts).tolist()
            for word, lp, next_lp, is_bpe in zip(shown, log_probs.tolist(), following, pieces, strict=False):
                self.stats.setdefault(word, WordStat(word, is_bpe)).add(lp, next_lp)

    def log_stats(self) -> None:
        """Logs the statistics of every word, the most frequent first."""
        for stat in sorted((self.stats or {}).values(), key=lambda stat: stat.count, reverse=True):
            logger.info("%s", stat)


@dataclass
class WordStat:
    """One word's row of `--output-word-stats`: word, count, summed log-probability, whether it has pieces, summed
    log-probability of the following words, how often there was one."""

    word: str
    is_bpe: bool
    count: int = 0
    log_prob: float = 0.0
    next_word_prob: float = 0.0
    missing_next_words: int = 0

    def add(self, log_prob: float, next_log_prob: float | None) -> None:
        """One more occurrence, followed by a word with `next_log_prob` (None at a sample's end)."""
        self.count += 1
        self.log_prob += log_prob
        if next_log_prob is None:
            self.missing_next_words += 1
        else:
            self.next_word_prob += next_log_prob

    def __str__(self) -> str:
        followed = self.count - self.missing_next_words
        return "\t".join(
            [self.word, str(self.count), str(self.log_prob), str(self.is_bpe), str(self.next_word_prob), str(followed)]
        )
