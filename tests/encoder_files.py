"""Small encoders for tests, learnt here with their own libraries; skipped where the extra `text` is not installed."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

SYLLABLES = "ka to mi re son dal vin pre un ter est ing".split()


def syllable_text() -> list[str]:
    """300 lines of 12 words each, of 400 different ones."""
    rng = random.Random(1)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=12)) for _ in range(300)]


def encoder_flags(folder: Path, name: str) -> dict[str, str]:
    """The flags of `--bpe NAME` for the files of `learn_encoders`."""
    files = {
        "sentencepiece": {"sentencepiece-vocab": "sp.model"},
        "gpt2": {"gpt2-encoder-json": "encoder.json", "gpt2-vocab-bpe": "vocab.bpe"},
        "subword_nmt": {"bpe-codes": "codes"},
        "fastbpe": {"bpe-codes": "fastcodes"},
    }[name]
    return {flag: str(folder / file) for flag, file in files.items()}


def learn_encoders(folder: Path) -> None:
    """Writes sp.model, codes (subword-nmt), fastcodes (fastBPE), encoder.json and vocab.bpe, learnt on some lines."""
    sentencepiece = pytest.importorskip("sentencepiece")
    learn_bpe = pytest.importorskip("subword_nmt.learn_bpe")
    tokenizers = pytest.importorskip("tokenizers")
    lines = syllable_text()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=120, minloglevel=2
    )
    (folder / "sp.model").write_bytes(model.getvalue())
    codes = io.StringIO()
    learn_bpe.learn_bpe(io.StringIO("\n".join(lines) + "\n"), codes, 60)
    (folder / "codes").write_text(codes.getvalue())
    merges = codes.getvalue().splitlines()[1:]
    (folder / "fastcodes").write_text("".join(f"{merge} {1000 - k}\n" for k, merge in enumerate(merges)))
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(lines, trainer)
    byte_level.model.save(str(folder))
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
