"""Encoders behind --bpe and --tokenizer: those without a library work, the others say what to install."""

import sys
from argparse import Namespace
from types import ModuleType

import pytest

from fairseq.data import encoders
from fairseq.errors import BadFlag, MissingDependency, MissingFile


class Codes:
    """Stands in for subword_nmt's BPE: splits off the last letter, and keeps what it was given."""

    def __init__(self, codes, separator):
        self.text, self.separator = codes.read(), separator

    def process_line(self, line):
        return " ".join(w if len(w) < 2 else f"{w[:-1]}{self.separator} {w[-1]}" for w in line.split())


@pytest.fixture
def subword_nmt(monkeypatch):
    package, module = ModuleType("subword_nmt"), ModuleType("subword_nmt.apply_bpe")
    module.BPE = Codes
    monkeypatch.setitem(sys.modules, "subword_nmt", package)
    monkeypatch.setitem(sys.modules, "subword_nmt.apply_bpe", module)


def test_none_by_default():
    assert encoders.build_bpe(Namespace(bpe=None)) is None
    assert encoders.build_tokenizer(Namespace()) is None


def test_space():
    space = encoders.build_tokenizer(Namespace(tokenizer="space"))
    assert space.encode(" a \t\u3000b\n") == "a b"
    assert space.decode("a b") == "a b"


def test_subword_nmt(subword_nmt, tmp_path):
    (tmp_path / "codes").write_text("#version: 0.2\na b</w>\n")
    bpe = encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=str(tmp_path / "codes")))
    assert bpe.encode("abc d") == "ab@@ c d"
    assert bpe.decode("ab@@ c d") == "abc d"
    assert not bpe.is_beginning_of_word("ab@@")
    assert bpe.bpe.text == "#version: 0.2\na b</w>\n"
    with pytest.raises(MissingFile, match="codes2: no such file"):
        encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=str(tmp_path / "codes2")))
    with pytest.raises(BadFlag, match="--bpe-codes"):
        encoders.build_bpe(Namespace(bpe="subword_nmt"))


def test_fastbpe_codes_are_translated(subword_nmt, tmp_path):
    (tmp_path / "codes").write_text("e n 1423551\ne r</w> 130\n")
    bpe = encoders.build_bpe(Namespace(bpe="fastbpe", bpe_codes=str(tmp_path / "codes")))
    assert bpe.bpe.text == "#version: 0.2\ne n\ne r</w>\n"


@pytest.mark.parametrize(
    "args, module, package",
    [
        (Namespace(bpe="subword_nmt", bpe_codes="codes"), "subword_nmt.apply_bpe", "subword-nmt"),
        (Namespace(bpe="sentencepiece", sentencepiece_vocab="model"), "sentencepiece", "sentencepiece"),
        (Namespace(tokenizer="moses"), "sacremoses", "sacremoses"),
        (Namespace(tokenizer="nltk"), "nltk.tokenize", "nltk"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, args, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        encoders.build_bpe(args)
        encoders.build_tokenizer(args)


def test_sentencepiece_pieces(monkeypatch, tmp_path):
    class Processor:
        def Load(self, path):
            raise OSError

        def EncodeAsPieces(self, text):
            return ["\u2581" + word for word in text.split()]

    module = ModuleType("sentencepiece")
    module.SentencePieceProcessor = Processor
    monkeypatch.setitem(sys.modules, "sentencepiece", module)
    args = Namespace(bpe="sentencepiece", sentencepiece_vocab=str(tmp_path / "model"))
    with pytest.raises(MissingFile, match="model: no such file"):
        encoders.build_bpe(args)
    Processor.Load = lambda self, path: None
    bpe = encoders.build_bpe(args)
    assert bpe.encode("a b") == "\u2581a \u2581b"
    assert bpe.decode("\u2581a b \u2581c") == "ab c"
    assert bpe.is_beginning_of_word("\u2581a")
    assert not bpe.is_beginning_of_word("a")
