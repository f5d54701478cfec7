"""Drafts change how fast a text is written, not the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fairseq.generation.choice import ChoiceSettings
from fairseq.generation.drafts import DraftedWriting, Drafter, DraftLength
from fairseq.generation.writing import write
from tests.generation.conftest import STRATEGIES


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_text_is_the_same(opened: Any, name: str, sampling: bool) -> None:
    lm, text = opened
    prompts = lm.prompts(text)
    settings = ChoiceSettings(max_len_b=16, sampling=sampling, seed=3)
    without = write(lm.positions(STRATEGIES[name], 0.6), prompts, settings, lm.symbols, traced=True)
    drafted = DraftedWriting(lm.positions(STRATEGIES[name], 0.6), settings, lm.symbols, 6, traced=True)
    for number, (prompt, (expected,)) in enumerate(zip(prompts, without)):
        written = drafted.write(prompt, number)
        assert written.tokens == expected.tokens
        torch.testing.assert_close(torch.tensor(written.log_probs), torch.tensor(expected.log_probs), atol=1e-4, rtol=0)
        searched = [known["searched"] for known in written.trace]
        assert searched == [known["searched"] for known in expected.trace]
    counts = drafted.counts
    assert counts.passes + counts.accepted == counts.tokens == sum(len(w[0].tokens) - 1 for w in without)
    assert counts.drafted > 0


def test_a_text_of_the_datastore_is_drafted(opened_fairseq: Any) -> None:
    """With nearly all the weight on chains of pointers, a passage of the datastore is written on in few passes."""
    lm, _ = opened_fairseq
    values = lm.stores.datastore.values
    prompt = torch.tensor(np.asarray(values[1000:1012], np.int64))
    drafted = DraftedWriting(
        lm.positions("--strategy retomaton_chains", 0.9), ChoiceSettings(max_len_b=40), lm.symbols, 8
    )
    written = drafted.write(prompt)
    assert drafted.counts.passes < 0.7 * len(written.tokens)


def test_drafts_for_the_model_alone(opened: Any) -> None:
    """Without weight, retrieval only drafts."""
    lm, text = opened
    prompts, settings = lm.prompts(text), ChoiceSettings(max_len_b=16)
    alone = write(lm.positions(retrieval=False), prompts, settings, lm.symbols)
    drafted = DraftedWriting(lm.positions("", 0.0), settings, lm.symbols, 6)
    assert [drafted.write(p, n).tokens for n, p in enumerate(prompts)] == [w[0].tokens for w in alone]


def test_one_search_serves_all_positions_of_a_pass(opened_fairseq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, text = opened_fairseq
    positions = lm.positions("--no-pointer", 0.6)
    sizes: list[int] = []
    search = positions.retrieval.knnlm.index.search
    monkeypatch.setattr(
        positions.retrieval.knnlm.index, "search", lambda queries, k: sizes.append(len(queries)) or search(queries, k)
    )
    drafted = DraftedWriting(positions, ChoiceSettings(max_len_b=16), lm.symbols, 6)
    for number, prompt in enumerate(lm.prompts(text)):
        drafted.write(prompt, number)
    assert len(sizes) == drafted.counts.passes + 4
    assert sum(sizes) == drafted.counts.passes + drafted.counts.drafted + 4


def test_the_best_pointer_agrees_longest() -> None:
    """Entries 2 and 8 have the same word; the words before 8 are those of the text, too."""
    values = np.array([9, 5, 7, 1, 2, 4, 5, 6, 7, 3, 8])
    drafter = Drafter(values, [4, 5, 6])
    drafter.observe(7, np.array([2, 8]))
    assert (drafter.pointers.tolist(), drafter.agreement.tolist()) == ([9, 3], [4, 1])
    assert drafter.best()[1].tolist() == [3, 8]
    drafter.observe(3, np.array([], np.int64))  # retrieval found nothing; the pointer goes on
    assert (drafter.pointers.tolist(), drafter.agreement.tolist()) == ([10], [5])
    drafter.observe(8, np.array([10, -1]))  # the last entry has no successor, and -1 is none
    assert drafter.best() == (0, pytest.approx([]))


def test_earlier_text_is_a_draft_too() -> None:
    """Where it agrees in more tokens than the entries do."""
    values = np.array([9, 5, 7, 1, 2, 4])
    drafter = Drafter(values, [1, 5, 6, 7, 8, 3, 1, 5, 6])
    drafter.observe(7, np.array([2]))
    assert (drafter.best()[0], drafter.best()[1][:3].tolist()) == (4, [8, 3, 1])
    drafter = Drafter(values, [7, 2, 9, 5])
    drafter.observe(7, np.array([2]))
    assert (drafter.best()[0], drafter.best()[1].tolist()) == (3, [1, 2, 4])


def test_most_of_the_best_pointers_decide() -> None:
    values = np.array([5, 1, 0, 5, 2, 0, 5, 2, 0])
    drafter = Drafter(values, [9])
    drafter.observe(5, np.array([0, 3, 6]))
    assert drafter.best()[1][:2].tolist() == [2, 0]


def test_length_follows_what_is_accepted() -> None:
    length = DraftLength(most=8)
    for _ in range(20):
        length.learn(5, 8, 8)
        length.learn(1, 2, 0)
    assert length.of(5) == 8 and length.of(1) == 0
    for _ in range(80):
        length.learn(5, 8, 0)
    lengths = [length.of(5) for _ in range(32)]
    assert sorted(lengths)[-3:] == [0, 1, 1]
    assert DraftLength(most=0).of(3) == 0
