"""The vocabulary: order, specials, padding, its file, and strings made from ids."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data import Dictionary, TruncatedDictionary
from fairseq.data.binarization import count_words
from fairseq.errors import BadFile, MissingFile, UserError

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=6)


def build(counts, **options):
    dictionary = Dictionary()
    for word, n in counts.items():
        dictionary.add_symbol(word, n)
    dictionary.finalize(**options)
    return dictionary


def test_specials_come_first():
    dictionary = Dictionary(extra_special_symbols=["<mask>"])
    assert dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()) == (0, 1, 2, 3)
    assert dictionary.nspecial == 5
    assert dictionary.index("nobody") == 3
    assert dictionary[99] == "<unk>"


def test_published_example(tmp_path):
    text = tmp_path / "text"
    text.write_text("b a\n\nb c\n")
    dictionary = Dictionary()
    count_words(str(text), dictionary)
    dictionary.finalize()
    dictionary.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_text() == "b 2\na 1\nc 1\nmadeupword0000 0\n"
    assert len(dictionary) == 8
    assert dictionary.count[dictionary.eos()] == 1 + 3


def test_ties_break_by_code_point_and_specials_keep_their_place():
    dictionary = build({"é": 2, "z": 2, "Z": 2, "\U0001f600": 2, "\ufb01": 2, "rare": 1, "<unk>": 50}, padding_factor=1)
    assert dictionary.symbols[4:] == ["Z", "z", "é", "\ufb01", "\U0001f600", "rare"]
    assert dictionary.count[3] == 51


def test_threshold_and_size_cut_before_padding():
    dictionary = build({"a": 5, "b": 4, "c": 3, "d": 1}, threshold=3, nwords=6, padding_factor=8)
    assert dictionary.symbols[4:] == ["a", "b", "madeupword0000", "madeupword0001"]
    assert build({"a": 5, "b": 1}, threshold=2, padding_factor=1).symbols[4:] == ["a"]


def test_entries_out_of_order_are_written_as_they_stand():
    """Loaded, not sorted: counts rise and fall."""
    text = "a 3\nb 3\nc 1\nd 3\ne 0\nf 0\n"
    stream = io.StringIO()
    Dictionary.load(io.StringIO(text)).save(stream)
    assert stream.getvalue() == text


def test_padding_words_that_exist_are_counted_on():
    dictionary = build({"madeupword0000": 2}, padding_factor=8)
    assert dictionary.symbols[4:] == [f"madeupword000{k}" for k in range(4)]
    assert dictionary.count[4:] == [2, 0, 0, 0]


def test_merge_adds_counts():
    first, second = build({"a": 1, "b": 2}, padding_factor=1), build({"b": 3, "c": 4}, padding_factor=1)
    first.update(second)
    assert first.symbols[4:] == ["b", "a", "c"]
    assert first.count[4:] == [5, 1, 4]


@given(st.dictionaries(WORDS, st.integers(1, 10**12), max_size=20))
def test_file_round_trip(counts):
    dictionary = build(counts)
    stream = io.StringIO(newline="")
    dictionary.save(stream)
    stream.seek(0)
    again = Dictionary.load(stream)
    assert (again.symbols[4:], again.count[4:]) == (dictionary.symbols[4:], dictionary.count[4:])
    assert again == dictionary


def test_load_keeps_repeated_symbols_and_understands_the_overwrite_marker():
    dictionary = Dictionary.load(io.StringIO("a 3\nb 2\na 1\n<s> 7 #fairseq:overwrite\nx y 4\r\n"))
    assert dictionary.symbols[4:] == ["a", "b", "a", "<s>", "x y"]
    assert dictionary.index("a") == 6
    assert dictionary.index("<s>") == 7


@pytest.mark.parametrize("line", ["word", "word x", "word 1.5"])
def test_bad_line_is_one_sentence(tmp_path, line):
    (tmp_path / "dict.txt").write_text(f"good 3\n{line}\n")
    with pytest.raises(BadFile, match=rf"dict.txt: found '{line}' in line 2, expected `symbol count`"):
        Dictionary.load(tmp_path / "dict.txt")


def test_missing_and_misencoded_files(tmp_path):
    with pytest.raises(MissingFile, match="dict.txt: no such file"):
        Dictionary.load(tmp_path / "dict.txt")
    (tmp_path / "dict.txt").write_bytes(b"\xff\xfe 3\n")
    with pytest.raises(BadFile, match="not UTF-8"):
        Dictionary.load(tmp_path / "dict.txt")


def test_encode_line():
    dictionary = build({"a": 2, "b": 1}, padding_factor=1)
    seen = []
    ids = dictionary.encode_line(" b\ta  x ", add_if_not_exist=False, consumer=lambda w, i: seen.append((w, i)))
    assert ids.dtype == torch.int32
    assert ids.tolist() == [5, 4, 3, 2]
    assert seen == [("b", 5), ("a", 4), ("x", 3)]
    assert dictionary.encode_line("b a", append_eos=False, reverse_order=True).tolist() == [4, 5]
    assert dictionary.encode_line("new b", reverse_order=True).tolist() == [5, 6, 2]
    assert "new" in dictionary


def test_string():
    dictionary = build({"he@@": 3, "llo": 2, "w": 1}, padding_factor=1)
    ids = torch.tensor([0, 4, 5, 1, 3, 2])
    assert dictionary.string(ids) == "he@@ llo <pad> <unk>"
    assert dictionary.string(ids, "@@ ", escape_unk=True) == "hello <pad> <<unk>>"
    assert dictionary.string(torch.stack([ids, ids]), "@@ ") == "hello <pad> <unk>\nhello <pad> <unk>"
    assert dictionary.string([5, 2], include_eos=True, separator="|") == "llo|</s>"


def test_truncated_dictionary_shares_everything_but_its_length():
    dictionary = build({"a": 3, "b": 2, "c": 1}, padding_factor=1)
    short = TruncatedDictionary(dictionary, 5)
    assert len(short) == 5
    assert (short[4], short[5]) == ("a", "<unk>")
    assert (short.pad(), short.index("b")) == (1, 5)
    assert len(TruncatedDictionary(dictionary, 100)) == len(dictionary) == 7


def test_padding_to_more_than_any_use_is_refused() -> None:
    with pytest.raises(UserError, match="--padding-factor: found 1000000000, expected at most"):
        Dictionary().pad_to_multiple_(1_000_000_000)
