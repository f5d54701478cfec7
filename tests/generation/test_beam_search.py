"""Beam search with retrieval, against a plain reference in which each hypothesis is read anew by an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairseq.generation.beam_search import beam_search
from fairseq.generation.choice import ChoiceSettings
from fairseq.generation.writing import write
from tests.generation.conftest import STRATEGIES, Opened

BEAM, LENGTH = 3, 5


def reference(lm: Opened, prompt: list[int], flags: str, weight: float) -> list[tuple[float, list[int]]]:
    """Every hypothesis begins with an automaton of its own, for every token."""
    end = lm.symbols.ends[0]
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for new in range(LENGTH):
        options = []
        for total, tokens in live:
            positions = lm.positions(flags, weight)
            log_probs = positions.begin([torch.tensor([*prompt, *tokens])]).log_probs[0]
            if lm.symbols.pad >= 0:
                log_probs[lm.symbols.pad] = -torch.inf
            if new == LENGTH - 1:
                log_probs[torch.arange(len(log_probs)) != end] = -torch.inf
            best = log_probs.topk(2 * BEAM)
            options += [(total + float(p), [*tokens, int(i)]) for p, i in zip(best.values, best.indices)]
        options = sorted(options, reverse=True)[: 2 * BEAM]
        finished += [(total / len(tokens), tokens) for total, tokens in options[:BEAM] if tokens[-1] == end]
        live = [(total, tokens) for total, tokens in options if tokens[-1] != end and total > -torch.inf][:BEAM]
        if len(finished) >= BEAM or not live:
            break
    return sorted(finished, reverse=True)[:BEAM]


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_hypothesis_has_its_own_automaton(opened: Any, name: str) -> None:
    lm, text = opened
    settings = ChoiceSettings(max_len_b=LENGTH)
    for prompt in lm.prompts(text)[:2]:
        expected = reference(lm, prompt.tolist(), STRATEGIES[name], 0.5)
        found = beam_search(lm.positions(STRATEGIES[name], 0.5), prompt, BEAM, settings, lm.symbols, traced=True)
        assert [written.tokens for written in found] == [tokens for _, tokens in expected]
        assert [written.score for written in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
        for written in found:
            assert [known["log_prob"] for known in written.trace] == pytest.approx(written.log_probs, abs=1e-6)


def test_a_beam_of_one_takes_the_likeliest(opened: Any) -> None:
    lm, text = opened
    prompt = lm.prompts(text)[0]
    (best,) = beam_search(lm.positions(), prompt, 1, ChoiceSettings(max_len_b=9), lm.symbols)
    ((greedy,),) = write(lm.positions(), [prompt], ChoiceSettings(max_len_b=9), lm.symbols)
    assert best.tokens[:-1] == greedy.tokens[: len(best.tokens) - 1]  # at the limit, the end is all that may follow
