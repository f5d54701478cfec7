"""The word table answers as a Python dictionary does."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.text_words import Words
from fairseq.data.word_table import WordTable

# Few distinct bytes, so that words share prefixes; NUL, and lengths around the multiples of eight.
WORD = st.one_of(
    st.lists(st.sampled_from(b"ab\x00\xff"), min_size=1, max_size=40).map(bytes),
    st.builds(lambda n, c: bytes([c]) * n, st.integers(1, 40), st.sampled_from(b"a\x00z")),
)


def listed(words):
    return [bytes(words.buffer[start:][:length]) for start, length in zip(words.starts, words.lengths)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(WORD, max_size=30), max_size=4), st.lists(WORD, max_size=20))
def test_like_a_dictionary(batches, questions):
    table, known = WordTable(), {}
    for batch in batches:
        ids = table.find_or_add(Words.from_list(batch))
        for word, idx in zip(batch, ids.tolist()):
            assert known.setdefault(word, idx) == idx
    assert sorted(known.values()) == list(range(len(table)))
    assert listed(table.words(np.arange(len(table)))) == sorted(known, key=known.__getitem__)
    order = table.alphabetical()
    assert listed(table.words(order)) == sorted(known)
    assert table.find(table.words(order[::3])).tolist() == order[::3].tolist()
    assert table.find(Words.from_list(questions)).tolist() == [known.get(word, -1) for word in questions]


def test_grows_through_many_sizes_and_relabels():
    rng = np.random.default_rng(0)
    words = [str(i).encode() * int(rng.integers(1, 12)) for i in range(30000)]
    words = list(dict.fromkeys(words))
    table = WordTable()
    ids = np.concatenate([table.find_or_add(Words.from_list(words[i : i + 700])) for i in range(0, len(words), 700)])
    assert len(table) == len(words) == len(set(ids.tolist()))
    known = listed(table.words(np.arange(len(table))))
    assert [known[i] for i in ids.tolist()] == words
    table.relabel(np.arange(len(words), dtype=np.int32)[::-1] * 2)
    assert np.array_equal(table.find(Words.from_list(words)), (len(words) - 1 - ids) * 2)
    assert table.find(Words.from_list([b"absent", b"absent" * 9])).tolist() == [-1, -1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=20), unique=True))
def test_strings_in_the_order_of_code_points(words):
    table = WordTable()
    ids = table.find_or_add(Words.from_strings(words))
    assert table.strings(ids) == words
    assert table.strings(table.alphabetical()) == sorted(words)


def test_words_from_strings_that_hold_line_ends():
    words = ["a", "", "b\n", "\n", "\ud800"]
    assert listed(Words.from_strings(words)) == [word.encode("utf-8", "surrogatepass") for word in words]
    assert listed(Words.from_strings([])) == []
