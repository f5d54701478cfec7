"""Counting words and their log-probabilities: the specification's check vector, against the definition, reports."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.evaluation.word_accounting import WordAccounting
from fairseq.evaluation.word_boundaries import find_boundaries

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "he@@", "llo", "world", "@@", "a@@b"]
HE, LLO, WORLD, EOS, BARE, INNER = 4, 5, 6, 2, 7, 8


class Words(list[str]):
    """As much of a dictionary as counting needs."""


def account(tokens: list[int], scores: list[float], marker: str | None = "@@ ", **reports: bool) -> WordAccounting:
    accounting = WordAccounting(Words(SYMBOLS), marker, **reports)
    accounting.add(7, np.array(tokens), np.array(scores, np.float32))
    return accounting


def test_check_vector() -> None:
    """`he@@ llo world </s>` at -1 -2 -3 -0.5: three words, 3.1258 bits, perplexity 8.73."""
    totals = account([HE, LLO, WORLD, EOS], [-1, -2, -3, -0.5]).totals
    assert totals.count == 3
    assert totals.log_prob == -6.5
    assert totals.loss_base2 == pytest.approx(3.1258, abs=5e-5)
    assert totals.perplexity == pytest.approx(8.73, abs=5e-3)


def test_without_merging() -> None:
    totals = account([HE, LLO, WORLD, EOS], [-1, -2, -3, -0.5], None).totals
    assert (totals.count, totals.log_prob) == (4, -6.5)


def test_unfinished_last_word_counts() -> None:
    """A subword that continues at the very end of a sample is neither merged nor skipped."""
    totals = account([WORLD, HE, HE], [-1, -2, -3]).totals
    assert (totals.count, totals.log_prob) == (2, -6)
    assert account([HE], [-1]).totals.count == 1


@pytest.mark.parametrize("marker", ["@@ ", "@@", "subword_nmt"])
def test_markers(marker: str) -> None:
    boundaries = find_boundaries(Words(SYMBOLS), marker)
    assert boundaries is not None and boundaries.goes_on is not None
    mask = boundaries.goes_on
    assert np.flatnonzero(mask).tolist() == [HE, BARE]  # only at the end of a symbol
    assert account([HE, LLO, WORLD, EOS], [-1, -2, -3, -0.5], marker).totals.count == 3


@given(st.lists(st.lists(st.sampled_from([HE, LLO, WORLD, EOS, BARE, INNER]), max_size=12), max_size=5))
def test_against_the_published_procedure(samples: list[list[int]]) -> None:
    """Token by token: the score of a subword that continues is added to the next token, and it is not counted."""
    accounting = WordAccounting(Words(SYMBOLS), "@@ ")
    total, count = 0.0, 0
    rng = np.random.default_rng(0)
    for number, tokens in enumerate(samples):
        scores = -rng.random(len(tokens)).astype(np.float32)
        accounting.add(number, np.array(tokens, np.int64), scores)
        moved, skipped = scores.astype(np.float64), 0
        for i in range(len(tokens) - 1):
            if tokens[i] in (HE, BARE):
                moved[i + 1] += moved[i]
                moved[i] = 0
                skipped += 1
        total += moved.sum()
        count += len(tokens) - skipped
    assert accounting.totals.count == count
    assert accounting.totals.log_prob == pytest.approx(total, abs=1e-9)


def test_totals_are_double_precision() -> None:
    """A million tokens of -0.1: single precision would be off in the fifth digit."""
    accounting = WordAccounting(Words(SYMBOLS))
    for _ in range(100):
        accounting.add(0, np.full(10000, WORLD), np.full(10000, -0.1, np.float32))
    assert accounting.totals.log_prob == pytest.approx(-1e6 * float(np.float32(0.1)), rel=1e-12)


def test_nothing_counted() -> None:
    totals = account([], []).totals
    assert totals.count == 0
    assert math.isnan(totals.loss_base2)


def test_huge_loss() -> None:
    assert account([WORLD], [-10000.0]).totals.perplexity == math.inf


def test_word_probabilities(caplog: pytest.LogCaptureFixture) -> None:
    """Sample number, then tab-joined words with the sum of their pieces; an unfinished word is not printed."""
    with caplog.at_level(logging.INFO):
        account([HE, LLO, WORLD, EOS], [-1, -2, -3, -0.5], report_words=True)
        account([WORLD, HE], [-1, -2], report_words=True)
        account([HE, LLO], [-1, -2], None, report_words=True)
    assert [record.getMessage() for record in caplog.records] == [
        "7 hello [-3.000000]\tworld [-3.000000]\t</s> [-0.500000]",
        "7 world [-1.000000]",
        "7 he@@ [-1.000000]\tllo [-2.000000]",
    ]


def test_word_statistics(caplog: pytest.LogCaptureFixture) -> None:
    """Word, count, its log-probability, whether it has pieces, that of the following words, how often there was one."""
    accounting = account([WORLD, WORLD, HE, LLO, EOS], [-1, -2, -3, -4, -0.5], collect_stats=True)
    with caplog.at_level(logging.INFO):
        accounting.log_stats()
    assert [record.getMessage() for record in caplog.records] == [
        "world\t2\t-3.0\tFalse\t-9.0\t2",
        "hello\t1\t-7.0\tTrue\t-0.5\t1",
        "</s>\t1\t-0.5\tFalse\t0.0\t0",
    ]
