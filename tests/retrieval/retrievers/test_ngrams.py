"""n-gram counts against dictionaries of tuples."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.errors import BadFile
from fairseq.retrieval.retrievers import ngrams
from fairseq.retrieval.retrievers.ngrams import NgramTable, contexts_of, count_ngrams, hash_contexts

EOS = 2


def plain_contexts(tokens: list[int], position: int, by_sentence: bool) -> list[int]:
    """The four tokens before a position, nearest first, one by one."""
    context: list[int] = []
    for back in range(1, 5):
        ended = by_sentence and bool(context) and context[-1] == EOS
        context.append(EOS if ended or position - back < 0 else tokens[position - back])
    return context


def plain_counts(tokens: list[int], by_sentence: bool) -> dict[tuple[int, ...], list[int]]:
    followers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, token in enumerate(tokens):
        context = plain_contexts(tokens, position, by_sentence)
        for order in range(1, 5):
            followers[tuple(context[:order])].append(token)
    return followers


@given(st.lists(st.integers(EOS, 6), max_size=40), st.booleans(), st.integers(1, 7))
@settings(max_examples=60)
def test_contexts(tokens: list[int], by_sentence: bool, step: int) -> None:
    array = np.array(tokens, np.uint16)
    parts = [
        contexts_of(array, start, min(start + step, len(tokens)), EOS, by_sentence)
        for start in range(0, len(tokens), step)
    ]
    expected = [plain_contexts(tokens, position, by_sentence) for position in range(len(tokens))]
    assert [row for part in parts for row in part.tolist()] == expected


@pytest.mark.parametrize("by_sentence", [False, True])
@pytest.mark.parametrize("memory", [1 << 30, 4096])
def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_sentence: bool, memory: int) -> None:
    monkeypatch.setattr(ngrams, "CHUNK", 97)
    tokens = np.random.default_rng(0).integers(EOS, 12, 600).astype(np.uint16)
    table = count_ngrams(tokens, str(tmp_path / "t"), EOS, by_sentence, memory, show_progress=False)
    followers = plain_counts(tokens.tolist(), by_sentence)
    for order in range(4):
        assert len(table.hashes[order]) == sum(len(context) == order + 1 for context in followers)
        assert (np.diff(table.hashes[order].astype(object)) > 0).all()
    asked = [plain_contexts(tokens.tolist(), position, by_sentence) for position in range(len(tokens))]
    asked += [[30, 31, 32, 33], [int(tokens[-1]), 31, 32, 33]]
    freq, fert = table.look_up(np.array(asked))
    for row, context in enumerate(asked):
        for order in range(4):
            seen = followers.get(tuple(context[: order + 1]), [])
            assert freq[row, order] == pytest.approx(np.log1p(len(seen)), rel=1e-6)
            assert fert[row, order] == pytest.approx(np.log1p(len(set(seen))), rel=1e-6)


def test_hashes_depend_on_order_and_place() -> None:
    contexts = np.array([[1, 2, 3, 4], [2, 1, 3, 4], [1, 2, 4, 3], [0, 0, 0, 0]])
    hashes = hash_contexts(contexts)
    assert hashes[0, 0] == hashes[2, 0] and hashes[0, 1] == hashes[2, 1]
    assert len(np.unique(hashes)) == hashes.size - 2


def test_an_empty_text(tmp_path: Path) -> None:
    table = count_ngrams(np.zeros(0, np.uint16), str(tmp_path), EOS, show_progress=False)
    assert table.look_up(np.array([[1, 2, 3, 4]]))[0].tolist() == [[0, 0, 0, 0]]


def test_a_finished_table_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(3, 53, dtype=np.int32)
    count_ngrams(tokens, str(tmp_path), EOS, info={"text": "a"}, show_progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(ngrams, "_count_part", None)
        assert len(count_ngrams(tokens, str(tmp_path), EOS, info={"text": "a"}, show_progress=False).hashes[0]) == 50
        with pytest.raises(TypeError):  # another text is counted, which is impossible here
            count_ngrams(tokens, str(tmp_path), EOS, info={"text": "b"}, show_progress=False)


def test_an_unfinished_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="fairseq-adaptret"):
        NgramTable.open(str(tmp_path))
