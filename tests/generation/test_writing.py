"""Written text: its probabilities and searches are those of an evaluation, whatever is written beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairseq.generation.choice import ChoiceSettings, Symbols
from fairseq.generation.writing import write
from tests.generation.conftest import STRATEGIES

SETTINGS = ChoiceSettings(max_len_b=12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_evaluation_agrees(opened: Any, name: str) -> None:
    """Prompts of unequal length, continued together: teacher-forced, each has the same log-probabilities, and the same
    searches, to the last token; and each is what is written alone."""
    lm, text = opened
    flags, prompts = STRATEGIES[name], lm.prompts(text)
    numbers = [0] * len(prompts)  # the number of the only sample of an evaluation, by which random_skip draws
    together = write(lm.positions(flags), prompts, SETTINGS, lm.symbols, numbers=numbers, traced=True)
    for prompt, (written,) in zip(prompts, together):
        assert written.tokens
        whole = [*prompt.tolist(), *written.tokens]
        result = lm.evaluated(whole, flags)
        torch.testing.assert_close(torch.tensor(written.log_probs), result.log_probs[len(prompt) :], atol=1e-4, rtol=0)
        assert [known["searched"] for known in written.trace] == result.searched[len(prompt) :].tolist()
        assert [known["candidates"] for known in written.trace] == result.candidates[len(prompt) :].tolist()
        ((alone,),) = write(lm.positions(flags), [prompt], SETTINGS, lm.symbols, numbers=[0])
        assert alone.tokens == written.tokens


def test_without_weight_it_is_the_model(opened: Any) -> None:
    lm, text = opened
    prompts = lm.prompts(text)
    with_retrieval = write(lm.positions(lmbda=0.0), prompts, SETTINGS, lm.symbols)
    alone = write(lm.positions(retrieval=False), prompts, SETTINGS, lm.symbols)
    assert [[(w.tokens, w.log_probs) for w in found] for found in with_retrieval] == [
        [(w.tokens, w.log_probs) for w in found] for found in alone
    ]


def test_retrieval_changes_what_is_written(opened: Any) -> None:
    """A weight near one writes what the datastore has."""
    lm, text = opened
    prompts = lm.prompts(text)
    strong = write(lm.positions("--no-pointer", lmbda=0.99), prompts, SETTINGS, lm.symbols)
    alone = write(lm.positions(retrieval=False), prompts, SETTINGS, lm.symbols)
    assert [w[0].tokens for w in strong] != [w[0].tokens for w in alone]


def test_samples_do_not_depend_on_what_is_written_beside_them(opened: Any) -> None:
    lm, text = opened
    prompts = lm.prompts(text)
    settings = ChoiceSettings(max_len_b=8, sampling=True, sampling_topp=0.9, seed=7)
    together = write(lm.positions(), prompts, settings, lm.symbols, samples=2)
    one = write(lm.positions(), prompts[2:3], settings, lm.symbols, samples=2, numbers=[2])
    assert [w.tokens for w in together[2]] == [w.tokens for w in one[0]]
    assert len({tuple(w.tokens) for found in together for w in found}) > len(prompts)
    other = write(lm.positions(), prompts, ChoiceSettings(**{**vars(settings), "seed": 8}), lm.symbols, samples=2)
    assert [w.tokens for w in other[0]] != [w.tokens for w in together[0]]


def test_where_a_text_ends(opened: Any) -> None:
    """At an end, and at the limits of length, of the flags and of the model."""
    lm, text = opened
    prompts = lm.prompts(text)
    (first, *_) = write(lm.positions(), prompts, SETTINGS, lm.symbols)
    end = first[0].tokens[2]
    ((ended,), *_) = write(lm.positions(), prompts, SETTINGS, Symbols((end,), lm.symbols.pad))
    at = first[0].tokens.index(end)
    assert (ended.tokens, ended.ended) == (first[0].tokens[: at + 1], True)
    for limit in (0, 1):
        found = write(lm.positions(), prompts, ChoiceSettings(max_len_b=limit), lm.symbols)
        assert [len(w[0].tokens) for w in found] == [limit] * len(prompts)
    positions = lm.positions()
    longest = positions.lm.longest
    long_prompt = prompts[1].repeat(longest)[: longest - 4]
    ((written,),) = write(positions, [long_prompt], ChoiceSettings(max_len_b=100), Symbols((), lm.symbols.pad))
    assert len(written.tokens) == 3
