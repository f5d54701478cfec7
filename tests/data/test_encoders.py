"""Encoders behind --bpe and --tokenizer, with the libraries themselves and files made here: text there and back, the
same from preprocess and hub, and one sentence for every kind of wrong file."""

from __future__ import annotations

import json
import pickle
import random
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from fairseq.data import encoders
from fairseq.data.encoders.codes import read_codes
from fairseq.data.encoders.gpt2_bpe import ALPHABET
from fairseq.data.text_encoder import TextEncoder
from fairseq.errors import BadFlag, MissingDependency, MissingFile, UserError
from tests.encoder_files import encoder_flags, syllable_text


def options(encoder_files: Path, name: str, **more: object) -> Namespace:
    flags = encoder_flags(encoder_files, name)
    return Namespace(bpe=name, **{flag.replace("-", "_"): path for flag, path in flags.items()}, **more)


NAMES = ("sentencepiece", "gpt2", "subword_nmt", "fastbpe")


def test_none_by_default() -> None:
    assert encoders.build_bpe(Namespace(bpe=None)) is None
    assert encoders.build_tokenizer(Namespace()) is None
    assert TextEncoder.build(Namespace(bpe=None, tokenizer=None)) is None


def test_space() -> None:
    space = encoders.build_tokenizer(Namespace(tokenizer="space"))
    assert space.encode(" a \t\u3000b\n") == "a b"
    assert space.decode("a b") == "a b"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text", ["kato resonding terx", "caf\u00e9 \u4e2d\u6587", "a\u3000b", "a\u00a0b \u0085 c", "x@@ y", "<unk> 1,250"]
)
def test_there_and_back(encoder_files: Path, name: str, text: str) -> None:
    bpe = encoders.build_bpe(options(encoder_files, name))
    pieces = bpe.encode(text)
    assert pieces.split() == pieces.split(" "), "a piece that whitespace cuts would be another token"
    expected = text if name == "gpt2" else " ".join(text.split())
    if name not in ("subword_nmt", "fastbpe") or "@@" not in text:  # the marker in the text is said by preprocess
        assert bpe.decode(pieces) == expected
    assert pickle.loads(pickle.dumps(bpe)).encode(text) == pieces


@pytest.mark.parametrize("name", NAMES)
def test_words_begin_where_the_text_has_spaces(encoder_files: Path, name: str) -> None:
    bpe = encoders.build_bpe(options(encoder_files, name))
    pieces = bpe.encode("kato resonding terx").split()
    assert len(pieces) > 3
    if name in ("subword_nmt", "fastbpe"):
        assert sum(bpe.is_beginning_of_word(piece) for piece in pieces) == 3  # asked of the piece before
    else:
        assert sum(map(bpe.is_beginning_of_word, pieces)) == 3 - (name == "gpt2")  # a line's first has no space


def test_fastbpe_and_subword_nmt_read_their_own_codes(encoder_files: Path) -> None:
    of_fastbpe = encoders.build_bpe(options(encoder_files, "fastbpe"))
    of_subword_nmt = encoders.build_bpe(options(encoder_files, "subword_nmt"))
    assert of_fastbpe.encode(" ".join(syllable_text())) == of_subword_nmt.encode(" ".join(syllable_text()))
    assert encoders.build_bpe(Namespace(bpe="fastbpe", bpe_codes=str(encoder_files / "codes"))).encode("kato")
    with pytest.raises(UserError, match="use --bpe fastbpe"):
        encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=str(encoder_files / "fastcodes")))


def test_codes_without_a_header_are_of_the_oldest_version(encoder_files: Path, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("t e\nte r\nter </w>\n")
    assert read_codes(str(tmp_path / "codes")).version == "0.1"
    bpe = encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=str(tmp_path / "codes")))
    assert bpe.encode("ter terx") == "ter ter@@ x"
    with pytest.raises(UserError, match="version 0.1"):
        encoders.build_bpe(Namespace(bpe="fastbpe", bpe_codes=str(tmp_path / "codes")))


def test_moses() -> None:
    pytest.importorskip("sacremoses")
    moses = encoders.build_tokenizer(Namespace(tokenizer="moses"))
    assert moses.encode("Hello, Mr. Smith & co.") == "Hello , Mr. Smith &amp; co ."
    assert moses.decode("Hello , Mr. Smith &amp; co .") == "Hello, Mr. Smith & co."


def test_a_language_that_moses_does_not_know_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("sacremoses")
    encoders.build_tokenizer(Namespace(tokenizer="moses", moses_source_lang="klingon"))
    assert "klingon" in caplog.text
    caplog.clear()
    encoders.build_tokenizer(Namespace(tokenizer="moses", moses_source_lang="de"))
    assert not caplog.text


DAMAGE = {
    "missing": None,
    "empty": b"",
    "a word": b"hello\n",
    "two words a line": b"good day\nday good\n",
    "other encoding": "t e\n".encode("utf-16"),
    "other encoding without mark": "t e\n".encode("utf-16-le"),
    "mark": b"\xef\xbb\xbf#version: 0.2\nt e\n",
    "binary": bytes(range(256)),
    "NUL": b"t e\0\n",
    "version": b"#version: 0.9\nt e\n",
    "only a header": b"#version: 0.2\n",
    "json list": b"[1, 2]",
    "json of words": b'{"a": "b"}',
    "json negative": b'{"a": -1}',
    "json twice": b'{"a": 1, "b": 1}',
    "json of one symbol": b'{"a": 1}',
    "json with a gap": json.dumps({character: 2 * k for k, character in enumerate(ALPHABET)}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("sentencepiece", "sentencepiece_vocab"),
        ("subword_nmt", "bpe_codes"),
        ("fastbpe", "bpe_codes"),
        ("gpt2", "gpt2_encoder_json"),
        ("gpt2", "gpt2_vocab_bpe"),
    ],
)
def test_a_wrong_file_is_one_sentence(encoder_files: Path, tmp_path: Path, name: str, flag: str, kind: str) -> None:
    path = tmp_path / "wrong"
    if (content := DAMAGE[kind]) is not None:
        path.write_bytes(content)
    args = options(encoder_files, name)
    setattr(args, flag, str(path))
    with pytest.raises(UserError, match="wrong: ") as error:
        encoders.build_bpe(args)
    assert "\n" not in str(error.value)
    assert (kind == "missing") == isinstance(error.value, MissingFile)
    setattr(args, flag, None)
    with pytest.raises(BadFlag, match="--" + flag.replace("_", "-")):
        encoders.build_bpe(args)


@pytest.mark.parametrize("name", ["codes", "fastcodes", "vocab.bpe"])
def test_merges_that_were_lost_or_moved_are_noticed(encoder_files: Path, tmp_path: Path, name: str) -> None:
    """Whatever a later merge needs must be made by an earlier one; a symbol needs its merge."""
    lines = (encoder_files / name).read_text().splitlines()
    first = int(lines[0].startswith("#"))
    made_of = next(i for i, line in enumerate(lines) if i > first + 3 and len(line.split()[0]) > 1)
    for number, wrong in enumerate((lines[:first] + lines[made_of:], lines[:first] + lines[first:][::-1])):
        path = tmp_path / f"wrong{number}"
        path.write_text("\n".join(wrong) + "\n")
        if name == "vocab.bpe":
            if number:
                continue  # in another order they are other merges of the same symbols
            args = options(encoder_files, "gpt2")
            args.gpt2_vocab_bpe = str(path)
        else:
            args = Namespace(bpe="fastbpe" if name == "fastcodes" else "subword_nmt", bpe_codes=str(path))
        with pytest.raises(UserError, match="wrong"):
            encoders.build_bpe(args)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["sp.model", "codes", "fastcodes", "encoder.json", "vocab.bpe"])
def test_damaged_files_give_a_sentence_or_an_encoder(encoder_files: Path, tmp_path: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    raw = bytearray((encoder_files / name).read_bytes())
    if seed % 2:
        del raw[rng.randrange(len(raw)) :]
    else:
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    (tmp_path / name).write_bytes(raw)
    of = {"sp.model": "sentencepiece", "codes": "subword_nmt", "fastcodes": "fastbpe"}.get(name, "gpt2")
    args = options(encoder_files, of)
    for key, value in vars(args).items():
        if str(value).endswith(name):
            setattr(args, key, str(tmp_path / name))
    try:
        bpe = encoders.build_bpe(args)
        assert all(isinstance(bpe.encode(line), str) for line in syllable_text()[:3])
    except UserError as error:
        named = [str(tmp_path / name), str(encoder_files / "vocab.bpe")]  # the latter where two do not belong together
        assert any(path in str(error) for path in named) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("args", "module", "package"),
    [
        (Namespace(bpe="subword_nmt", bpe_codes="codes"), "subword_nmt.apply_bpe", "subword-nmt"),
        (Namespace(bpe="sentencepiece", sentencepiece_vocab="model"), "sentencepiece", "sentencepiece"),
        (Namespace(bpe="gpt2", gpt2_encoder_json="encoder.json"), "tokenizers", "tokenizers"),
        (Namespace(tokenizer="moses"), "sacremoses", "sacremoses"),
        (Namespace(tokenizer="nltk"), "nltk.tokenize", "nltk"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, args: Namespace, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        encoders.build_bpe(args)
        encoders.build_tokenizer(args)


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert len(ALPHABET) == 256 and sorted(ALPHABET.values()) == list(range(256))
    assert ALPHABET["\u0120"] == 0x20 and ALPHABET["\u010a"] == 0x0A and ALPHABET["!"] == 0x21


def test_special_words_pass_through_gpt2s_decoding(encoder_files: Path) -> None:
    bpe = encoders.build_bpe(options(encoder_files, "gpt2"))
    assert bpe.decode(f"{bpe.encode('kato')} <unk> madeupword0000") == "kato<unk>madeupword0000"
    with pytest.raises(UserError, match="is not an id"):
        bpe.decode("hello")


def test_lines_are_encoded_one_by_one_and_marks_are_counted(encoder_files: Path) -> None:
    odd: Counter[str] = Counter()
    encoder = TextEncoder.build(options(encoder_files, "subword_nmt", tokenizer=None))
    assert encoder is not None
    encoded = encoder.encode(b" kato \r\n\rcat@@ dal\n", odd).decode().split("\n")
    assert encoded[:2] == [encoder.bpe.encode("kato"), ""] and len(encoded) == 4 and encoded[3] == ""
    assert sum(odd.values()) == 1


def test_the_other_language_has_its_own_rules() -> None:
    pytest.importorskip("sacremoses")
    args = Namespace(tokenizer="moses", source_lang="en", target_lang="fr")
    source, target = (TextEncoder.build(args, lang) for lang in ("en", "fr"))
    assert source is not None and target is not None
    odd: Counter[str] = Counter()
    assert source.line("l'ami", odd) == "l &apos;ami" and target.line("l'ami", odd) == "l&apos; ami"


def test_json_keys_of_another_vocabulary_are_refused(encoder_files: Path, tmp_path: Path) -> None:
    symbols = json.loads((encoder_files / "encoder.json").read_text())
    longest = max(symbols, key=len)
    symbols["other"] = symbols.pop(longest)
    (tmp_path / "encoder.json").write_text(json.dumps(symbols))
    args = options(encoder_files, "gpt2")
    args.gpt2_encoder_json = str(tmp_path / "encoder.json")
    with pytest.raises(UserError, match="belong together"):
        encoders.build_bpe(args)
