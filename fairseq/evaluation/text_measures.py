"""Perplexities of one evaluation as each community states them: per token, per word, per byte, and bits per byte, with
the counts under them and the convention by which they were made."""

from __future__ import annotations

import logging
import math
from typing import Any

logger = logging.getLogger(__name__)


def perplexity_of(nats: float, count: int) -> float | None:
    """exp(nats / count), None without a count."""
    if not count:
        return None
    try:
        return math.exp(nats / count)
    except OverflowError:
        return math.inf


def text_measures(nats: float, scored: int, text: dict[str, Any], convention: dict[str, Any]) -> dict[str, Any]:
    """Figures for the results file. nats: the sum of minus the log-probabilities of `scored` tokens; text: the counts
    of the split's sidecar; convention: how the text was cut.

    Words and bytes are those of the whole text, so per word and per byte there is a figure only where at most the first
    token of it is left out; `words` are separated by white space, `lm_eval_words` counted as lm-evaluation-harness
    does, which takes a line end at the end of a document for one more."""
    unscored = text["tokens"] - scored
    whole = unscored <= 1
    words, other, count = (text[name] if whole else 0 for name in ("words", "split_words", "bytes"))
    return {
        "nats": nats,
        "tokens": scored,
        "tokens_not_scored": unscored,
        "token_perplexity": perplexity_of(nats, scored),
        "words": text["words"],
        "word_perplexity": perplexity_of(nats, words),
        "lm_eval_words": text["split_words"],
        "lm_eval_word_perplexity": perplexity_of(nats, other),
        "bytes": text["bytes"],
        "byte_perplexity": perplexity_of(nats, count),
        "bits_per_byte": nats / count / math.log(2) if count else None,
        "convention": convention,
    }


def log_measures(measures: dict[str, Any]) -> None:
    """One line for the figures, one for the convention."""
    convention = measures["convention"]
    named = ("token", "word", "byte")
    parts = [f"per {name} {measures[name + '_perplexity']:.4f} ({measures[name + 's']} {name}s)"
             for name in named if measures[name + "_perplexity"] is not None]
    if measures["bits_per_byte"] is not None:
        parts.append(f"{measures['bits_per_byte']:.4f} bits per byte")
    else:
        parts.append(f"no figures for words and bytes, as {measures['tokens_not_scored']} tokens are not scored")
    logger.info("Perplexity %s", ", ".join(parts))
    logger.info("Convention: %s", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in convention.items()))
