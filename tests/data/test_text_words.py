"""Words and lines found in bytes are those that Python finds in text."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data import text_words
from fairseq.data.text_words import LINE_END, part_offsets, read_pieces, split_words
from fairseq.errors import BadFile, MissingFile

WHITESPACE = "".join(chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace())
# Whitespace, its look-alikes (U+200B, U+180E, U+FEFF and neighbours of whitespace in UTF-8), and words of all widths.
ODD = st.lists(
    st.one_of(
        st.sampled_from([*WHITESPACE, "\r\n", "\n", "\r", " "]),
        st.sampled_from(["a", "é", "\u200b", "\u180e", "\ufeff", "\u2027", "\u202a", "\u3001", "\x84", "\x00", "\x1b"]),
        st.sampled_from(["</s>", "<unk>", "世界", "\U0001f600", "x" * 8, "y" * 9, "z" * 33, "é" * 17]),
        st.text(st.characters(codec="utf-8"), max_size=4),
    ),
    max_size=40,
).map("".join)


def words_of(text: bytes) -> list[bytes]:
    words = split_words(text)
    return [words.buffer[s : s + n].tobytes() for s, n in zip(words.starts.tolist(), words.lengths.tolist())]


def expected_words(path) -> list[bytes]:
    with open(path, encoding="utf-8") as stream:
        return [word for line in stream for word in [*(w.encode() for w in line.split()), LINE_END]]


def test_every_whitespace_character_separates():
    for space in set(WHITESPACE) - set("\n\r"):
        assert words_of(f"a{space}é{space}{space}b".encode()) == [b"a", "é".encode(), b"b"], repr(space)


def test_characters_around_whitespace_do_not():
    near = {chr(ord(c) + d) for c in WHITESPACE for d in (-1, 1)} - set(WHITESPACE)
    for character in near:
        assert words_of(f"a{character}b".encode()) == [f"a{character}b".encode()], repr(character)


@settings(max_examples=300, deadline=None)
@given(text=ODD, piece=st.integers(1, 12))
def test_words_and_lines_as_python_reads_them(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode())
    expected = expected_words(path)
    for size in (piece, 1 << 19):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_words, "PIECE", size)
            for whole_lines in (False, True):
                pieces = list(read_pieces(str(path), whole_lines=whole_lines))
                assert [word for p in pieces for word in words_of(p)] == expected


@settings(max_examples=200, deadline=None)
@given(text=ODD, parts=st.integers(1, 9))
def test_parts_cover_the_lines_once(tmp_path_factory, text, parts):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode())
    offsets = part_offsets(str(path), parts)
    assert len(offsets) == parts + 1
    assert offsets == sorted(offsets)
    pieces = [p for start, end in zip(offsets, offsets[1:]) for p in read_pieces(str(path), start, end)]
    assert [word for p in pieces for word in words_of(p)] == expected_words(path)


@pytest.mark.parametrize("piece", [4, 1 << 19])
def test_invalid_utf8_names_file_and_offset(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text_words, "PIECE", piece)
    (tmp_path / "text").write_bytes("fine é\nand ".encode() + b"caf\xe9 then\n")
    with pytest.raises(BadFile, match=r"text: found byte 0xe9 at offset 15, which is not UTF-8 .*expected UTF-8 text"):
        list(read_pieces(str(tmp_path / "text")))


def test_truncated_character_at_the_end(tmp_path):
    (tmp_path / "text").write_bytes(b"a \xe2\x80")
    with pytest.raises(BadFile, match="offset 2"):
        list(read_pieces(str(tmp_path / "text")))


def test_missing_text():
    with pytest.raises(MissingFile, match="nowhere: no such file"):
        list(read_pieces("nowhere"))


def test_lines_longer_than_a_piece_are_held_together(tmp_path, monkeypatch):
    monkeypatch.setattr(text_words, "PIECE", 16)
    (tmp_path / "text").write_bytes(b"a b " * 50 + b"\n" + b"end " * 9)
    pieces = list(read_pieces(str(tmp_path / "text"), whole_lines=True))
    assert [len(p) for p in pieces][0] == 201
    assert max(map(len, read_pieces(str(tmp_path / "text")))) <= 17
    assert np.concatenate([split_words(p).lengths for p in pieces]).sum() == 100 + 1 + 27 + 1
