"""Binarisation against a plain loop; one worker or many, one piece or many, the same bytes."""

import errno
import multiprocessing
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data import Dictionary, IndexedRawTextDataset, MMapIndexedDataset, binarization, text_words
from fairseq.data.binarization import Binarizer, Encoder, NumberedText, binarize_file, count_words, parse_alignment
from fairseq.data.indexed_dataset import make_builder
from fairseq.data.vocabulary import Vocabulary, build_dictionary
from fairseq.errors import UserError
from fairseq.files.output_lock import exclusive

TOKENS = ["a", "b", "é", "<unk>", "</s>", "longer-than-eight-bytes", "x" * 40, " ", "\u3000", "\x1c", "\x85", "\u2028"]
TEXT = st.lists(st.sampled_from([*TOKENS, " ", "\n", "\r", "\r\n", "\ufeff", "n\x00ul"]), max_size=60).map("".join)


def plain(path, dictionary):
    """The definition: one line after the other."""
    items, replaced = [], 0
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            words = line.split()
            items.append([dictionary.index(word) for word in words] + [2])
            replaced += sum(dictionary.index(word) == 3 and word != "<unk>" for word in words)
    return items, replaced


def plain_dictionary(path):
    dictionary = Dictionary()
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            for word in [*line.split(), "</s>"]:
                dictionary.add_symbol(word)
    dictionary.finalize(threshold=2)
    return dictionary


def write(path, dictionary, **options):
    builder = make_builder(str(path) + ".bin", "mmap", len(dictionary))
    summary = binarize_file(options.pop("text"), str(path), dictionary, builder, **options)
    builder.finalize(str(path) + ".idx")
    return summary


@settings(max_examples=150, deadline=None)
@given(text=TEXT, piece=st.integers(1, 30))
def test_one_pass_and_two_passes_equal_the_plain_loop(tmp_path_factory, text, piece):
    folder = tmp_path_factory.mktemp("binarize")
    path = folder / "text"
    path.write_bytes(text.encode())
    expected = plain_dictionary(path)
    items, replaced = plain(path, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_words, "PIECE", piece)
        with NumberedText(str(path), str(folder / "one")) as numbered:
            dictionary = build_dictionary([numbered.vocabulary], threshold=2)
            assert (dictionary.symbols, dictionary.count) == (expected.symbols, expected.count)
            builder = make_builder(str(folder / "one.bin"), "mmap", len(dictionary))
            first = numbered.write(builder, dictionary)
            builder.finalize(str(folder / "one.idx"))
        second = write(folder / "two", dictionary, text=str(path))
    assert first == second
    assert (first.nseq, first.ntok, first.nunk) == (len(items), sum(map(len, items)), replaced)
    for name in ("one", "two"):
        dataset = MMapIndexedDataset(str(folder / name))
        assert [item.tolist() for item in dataset] == items
    assert sorted(p.name for p in folder.iterdir()) == ["one.bin", "one.idx", "text", "two.bin", "two.idx"]


@pytest.fixture
def odd_text(tmp_path):
    rng = np.random.default_rng(3)
    pieces = rng.choice([*TOKENS, " ", " ", " ", "\n", "\r", "\r\n"], size=3000)
    (tmp_path / "text").write_bytes("".join(pieces).encode())
    return tmp_path / "text"


@pytest.mark.parametrize("workers", [2, 5])
def test_many_workers_give_the_same_bytes(odd_text, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(binarization, "SMALLEST_PART", 100)
    dictionary = plain_dictionary(odd_text)
    one = write(tmp_path / "one", dictionary, text=str(odd_text))
    done = []
    leftover = tmp_path / "many.part7.4242-0123abcd.tmp.tokens"
    leftover.write_bytes(b"left by a killed run with more workers, or written by another run at this moment")
    write(tmp_path / "many", dictionary, text=str(odd_text), workers=workers)
    assert leftover.exists()
    with exclusive(tmp_path / "many"):  # now there is no other run
        assert write(tmp_path / "many", dictionary, text=str(odd_text), workers=workers, progress=done.append) == one
    assert not leftover.exists()
    assert sum(done) == odd_text.stat().st_size
    assert len(done) == workers
    with NumberedText(str(odd_text), str(tmp_path / "numbered"), workers) as numbered:
        counted = build_dictionary([numbered.vocabulary], threshold=2)
        assert (counted.symbols, counted.count) == (dictionary.symbols, dictionary.count)
        builder = make_builder(str(tmp_path / "numbered.bin"), "mmap", len(counted))
        assert numbered.write(builder, counted) == one
        builder.finalize(str(tmp_path / "numbered.idx"))
    for suffix in (".bin", ".idx"):
        reference = (tmp_path / ("one" + suffix)).read_bytes()
        assert (tmp_path / ("many" + suffix)).read_bytes() == reference
        assert (tmp_path / ("numbered" + suffix)).read_bytes() == reference
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_dictionary_of_several_texts(odd_text, tmp_path):
    """As if they were one text; words of one of them, of both, special ones."""
    (tmp_path / "other").write_text("other words\n\na é <unk> <pad> words n\0ul\n")
    whole = tmp_path / "whole"
    whole.write_bytes(odd_text.read_bytes() + b"\n" + (tmp_path / "other").read_bytes())
    odd_text.write_bytes(odd_text.read_bytes() + b"\n")
    with NumberedText(str(odd_text), None) as one, NumberedText(str(tmp_path / "other"), None) as two:
        for threshold, nwords in ((-1, -1), (2, -1), (0, 9), (3, 3)):
            wanted = Dictionary()
            count_words(str(whole), wanted)
            wanted.finalize(threshold, nwords)
            joined = build_dictionary([one.vocabulary, two.vocabulary], threshold, nwords)
            assert (joined.symbols, joined.count, joined.indices) == (wanted.symbols, wanted.count, wanted.indices)


def test_a_killed_worker_is_one_sentence(odd_text, tmp_path, monkeypatch):
    monkeypatch.setattr(binarization, "SMALLEST_PART", 100)
    monkeypatch.setattr(Vocabulary, "contents", lambda _: os._exit(9))  # called by workers only
    with pytest.raises(UserError, match="text: a worker process was killed; try fewer --workers"):
        NumberedText(str(odd_text), str(tmp_path / "out"), workers=2)
    assert not list(tmp_path.glob("out*"))


def test_a_mistake_found_here_ends_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(binarization, "SMALLEST_PART", 1)
    monkeypatch.setattr(Vocabulary, "contents", lambda _: time.sleep(300))
    (tmp_path / "text").write_bytes(b"bad \xff line\n" + b"good line\n" * 5)
    with pytest.raises(UserError, match=r"text: found byte 0xff at offset 4"):
        NumberedText(str(tmp_path / "text"), str(tmp_path / "out"), workers=3)
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_a_worker_finds_full(odd_text, tmp_path, monkeypatch):
    monkeypatch.setattr(binarization, "SMALLEST_PART", 100)
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")

    monkeypatch.setattr(Vocabulary, "contents", full)
    with pytest.raises(OSError, match="No space left on device: 'some file'"):
        NumberedText(str(odd_text), str(tmp_path / "out"), workers=2)
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("out*"))


def test_a_worker_reports_bad_text_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(binarization, "SMALLEST_PART", 1)
    (tmp_path / "text").write_bytes(b"good line\n" * 5 + b"bad \xff line\n")
    with pytest.raises(UserError, match=r"text: found byte 0xff at offset 54"):
        NumberedText(str(tmp_path / "text"), str(tmp_path / "out"), workers=2)
    assert not list(tmp_path.glob("out*"))


def test_count_words_with_any_tokenizer(odd_text):
    fast, slow = Dictionary(), Dictionary()
    count_words(str(odd_text), fast)
    count_words(str(odd_text), slow, tokenize=lambda line: line.split())
    assert (fast.symbols, fast.count) == (slow.symbols, slow.count)
    assert fast.symbols[4:] == sorted(fast.symbols[4:])
    again = Dictionary()
    Dictionary.add_file_to_dictionary(str(odd_text), again, num_workers=1)
    assert again.count == fast.count


def test_line_by_line_interface(odd_text):
    dictionary = plain_dictionary(odd_text)
    items, replaced = plain(odd_text, dictionary)
    seen = []
    result = Binarizer.binarize(str(odd_text), dictionary, lambda ids: seen.append(ids.tolist()))
    assert seen == items
    assert (result["nseq"], result["nunk"], result["ntok"]) == (len(items), replaced, sum(map(len, items)))
    assert sum(result["replaced"].values()) == replaced
    offsets = Binarizer.find_offsets(str(odd_text), 3)
    assert offsets[0] == offsets[3] == 0
    seen.clear()
    for start, end in zip(offsets, offsets[1:]):
        Binarizer.binarize(str(odd_text), dictionary, lambda ids: seen.append(ids.tolist()), offset=start, end=end)
    assert seen == items


def test_numbers_instead_of_words(tmp_path):
    (tmp_path / "text").write_text("7 8\n9\n")
    seen = []
    Binarizer.binarize(
        str(tmp_path / "text"), Dictionary(), lambda ids: seen.append(ids.tolist()), already_numberized=True
    )
    assert seen == [[7, 8, 2], [9, 2]]


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("reverse_order", [True, False])
def test_raw_text_dataset(odd_text, append_eos, reverse_order):
    dictionary = plain_dictionary(odd_text)
    dataset = IndexedRawTextDataset(str(odd_text), dictionary, append_eos, reverse_order)
    with open(odd_text, encoding="utf-8") as stream:
        lines = list(stream)
    assert len(dataset) == len(lines)
    for i, line in enumerate(lines):
        expected = dictionary.encode_line(
            line, add_if_not_exist=False, append_eos=append_eos, reverse_order=reverse_order
        )
        assert dataset[i].tolist() == expected.tolist()
        assert dataset.get_original_text(i) == line.rstrip("\n")


def test_empty_file(tmp_path):
    (tmp_path / "text").write_bytes(b"")
    assert list(Encoder(Dictionary()).encode_file(str(tmp_path / "text"))) == []
    summary = write(tmp_path / "out", Dictionary(), text=str(tmp_path / "text"))
    assert (summary.nseq, summary.ntok) == (0, 0)
    assert len(MMapIndexedDataset(str(tmp_path / "out"))) == 0


def test_alignment_lines():
    assert parse_alignment("0-0 1-2\n").tolist() == [0, 0, 1, 2]
    assert parse_alignment("").tolist() == []
    with pytest.raises(UserError, match="expected pairs such as"):
        parse_alignment("0-0 1")
