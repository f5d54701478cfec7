"""Counting words and computing perplexity: subwords are joined to words, totals are float64. Also the optional reports
of words and their log-probabilities."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.evaluation.word_boundaries import find_boundaries

logger = logging.getLogger(__name__)

EOS, UNK = 2, 3


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
    """Adds up log-probabilities and counts of samples. marker: the value of `--remove-bpe`, by which subwords are
    joined (for "gpt2", gpt2_encoder_json is the encoder's file); report_words: log each sample's words; collect_stats:
    collect statistics per word. The attribute `unit` is "word" where subwords are joined, else "token"."""

    def __init__(
        self,
        dictionary: Any,
        marker: str | None = None,
        report_words: bool = False,
        collect_stats: bool = False,
        gpt2_encoder_json: str | None = None,
    ) -> None:
        self.dictionary = dictionary
        self.boundaries = find_boundaries(dictionary, marker, gpt2_encoder_json)
        self.unit = "token" if self.boundaries is None else "word"
        self.report_words = report_words
        self.stats: dict[str, WordStat] | None = {} if collect_stats else None
        self.totals = Totals()
        self.cut = self.joined_to_eos = self.unknown = 0

    def add(
        self, sample_id: int, tokens: NDArray[np.int64], log_probs: NDArray[np.float32], preceding: int = -1
    ) -> None:
        """Adds one sample: tokens (T,) and their log-probabilities (T,) in nats; preceding: the token before the
        first."""
        if not len(tokens):
            return
        counted = self.counted(tokens, preceding)
        self.totals.log_prob += float(log_probs.astype(np.float64).sum())
        self.totals.count += int(np.count_nonzero(counted))
        self._note_guesses(tokens)
        if self.report_words or self.stats is not None:
            self._report(sample_id, tokens, log_probs, counted)

    def counted(self, tokens: NDArray[np.int64], preceding: int = -1) -> NDArray[np.bool_]:
        """(T,) bool: the tokens of a sample at which a word is counted. With a marker for subwords that continue, this
        is the last subword of a word (the sample's last token counts even if it has the marker, as in fairseq); with
        marks of beginnings, it is the first subword."""
        if self.boundaries is None or not len(tokens):
            return np.ones(len(tokens), bool)
        if self.boundaries.goes_on is None:
            return self.boundaries.starts(tokens, preceding)
        counted = ~self.boundaries.goes_on[tokens]
        counted[-1] = True
        return counted

    def _note_guesses(self, tokens: NDArray[np.int64]) -> None:
        if self.boundaries is None:
            return
        goes_on = self.boundaries.goes_on
        if goes_on is None:
            self.unknown += int(np.count_nonzero(tokens == UNK))
        else:
            self.cut += int(goes_on[tokens[-1]])
            self.joined_to_eos += int(np.count_nonzero(goes_on[tokens[:-1]] & (tokens[1:] == EOS)))

    def log_guesses(self) -> None:
        """Logs how many words were counted by a rule that may be wrong for this text."""
        count = self.totals.count
        if self.cut:
            logger.info("%d words are cut by the end of a sample; each part counts as a word, as in fairseq", self.cut)
        if self.joined_to_eos:
            logger.warning(
                "--remove-bpe: %d pieces go on by the marker but end a line, and count as one word with its end; the "
                "text may not have been encoded with this marker",
                self.joined_to_eos,
            )
        if self.unknown:
            logger.warning("--remove-bpe: every <unk> (%d of %d words) counts as a beginning", self.unknown, count)

    def _report(
        self,
        sample_id: int,
        tokens: NDArray[np.int64],
        log_probs: NDArray[np.float32],
        counted: NDArray[np.bool_],
    ) -> None:
        """Reports the sample's words. Words without a counted subword in the sample are left out: with a marker, a last
        word that continues; with marks of beginnings, the rest of a word that began in another sample."""
        boundaries = self.boundaries
        if boundaries is None or boundaries.goes_on is None:
            starts = np.flatnonzero(counted)
        else:
            starts = np.concatenate([[0], np.flatnonzero(counted)[:-1] + 1])
        if not len(starts):
            return
        sums = np.add.reduceat(log_probs.astype(np.float64), starts).tolist()
        ends = [*starts[1:].tolist(), len(tokens)]
        symbols = [self.dictionary[int(token)] for token in tokens]
        pieces = [symbols[start:end] for start, end in zip(starts.tolist(), ends)]
        words = ["".join(word) if boundaries is None else boundaries.join(word) for word in pieces]
        if boundaries is not None and boundaries.goes_on is not None and boundaries.goes_on[tokens[-1]]:
            words.pop()
        if self.report_words:
            logger.info("%d %s", sample_id, "\t".join(f"{word} [{lp:.6f}]" for word, lp in zip(words, sums)))
        if self.stats is not None:
            following = [*sums[1:], None]
            for word, lp, next_lp, parts in zip(words, sums, following, pieces):
                self.stats.setdefault(word, WordStat(word, len(parts) > 1)).add(lp, next_lp)

    def log_stats(self) -> None:
        """Logs the statistics of every word, the most frequent first."""
        for stat in sorted((self.stats or {}).values(), key=lambda stat: stat.count, reverse=True):
            logger.info("%s", stat)


@dataclass
class WordStat:
    """One word's row of `--output-word-stats`: word, count, sum of log-probabilities, whether it consists of several
    subwords, sum of the log-probabilities of the following words, number of occurrences with a following word."""

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
