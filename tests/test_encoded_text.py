"""Text encoded by preprocess.py, a model of it, and `--remove-bpe`: the same bytes from any number of workers, and a
perplexity per word whose words are those of the text, wherever samples are cut."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from fairseq.data import Dictionary, data_utils, encoders
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models.transformer_lm import TransformerLanguageModel
from tests.encoder_files import encoder_flags, syllable_text

NAMES = ("sentencepiece", "gpt2", "subword_nmt", "fastbpe")
TRAIN = (
    "--task language_modeling --arch transformer_lm --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--decoder-layers 1 --decoder-attention-heads 1 --lr 0.1 --clip-norm 1 --max-update 1 --no-progress-bar "
    "--disable-validation --tokens-per-sample 64 --max-tokens 512"
).split()
BLOCKS = {
    "blocks": ["--sample-break-mode", "none"],
    "blocks with context": ["--sample-break-mode", "none", "--context-window", "16"],
    "lines": ["--sample-break-mode", "eos"],
}


def flags(encoder_files: Path, name: str) -> list[str]:
    pairs = encoder_flags(encoder_files, name).items()
    return ["--bpe", name, *(word for flag, path in pairs for word in (f"--{flag}", path))]


def preprocess(run_cli: Any, folder: Path, *words: str) -> Any:
    text = ["--trainpref", folder / "train", "--testpref", folder / "test"]
    return run_cli("preprocess", ["--only-source", "--no-progress-bar", *text, *words])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = syllable_text()
    (tmp_path / "train").write_text("\n".join([*lines[:250], "", "caf\u00e9 \u4e2d x"]) + "\n")
    (tmp_path / "test").write_text("\n".join(lines[250:]) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_workers_writes_the_same_bytes(
    run_cli: Any, texts: Path, encoder_files: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq.data.binarization.SMALLEST_ENCODED_PART", 500)
    for workers in ("1", "3"):
        more = [*flags(encoder_files, name), "--tokenizer", "space", "--workers", workers]
        done = preprocess(run_cli, texts, *more, "--destdir", str(texts / workers))
        assert done.status == 0, done.stderr
    for file in ("train.bin", "train.idx", "test.bin", "test.idx", "dict.txt"):
        assert (texts / "1" / file).read_bytes() == (texts / "3" / file).read_bytes(), file
    dictionary = Dictionary.load(texts / "1" / "dict.txt")
    bpe = encoders.build_bpe(namespace(encoder_files, name))
    lines = (texts / "train").read_text().splitlines()
    dataset = data_utils.load_indexed_dataset(str(texts / "1" / "train"), dictionary)
    assert [dictionary.string(dataset[i]) for i in range(len(dataset))] == [bpe.encode(line) for line in lines]


def namespace(encoder_files: Path, name: str) -> Namespace:
    return Namespace(bpe=name, **{k.replace("-", "_"): v for k, v in encoder_flags(encoder_files, name).items()})


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_per_word_of_the_text(run_cli: Any, texts: Path, encoder_files: Path, name: str) -> None:
    data, model = texts / "bin", texts / "model"
    assert preprocess(run_cli, texts, *flags(encoder_files, name), "--destdir", str(data)).status == 0
    assert run_cli("train", [data, *TRAIN, "--save-dir", model]).status == 0
    lines = (texts / "test").read_text().splitlines()
    words = sum(len(line.split()) + 1 for line in lines)  # and each line's end
    evaluation = [data, "--path", model / "checkpoint_last.pt", "--no-progress-bar", "--max-tokens", "512"]
    more = ["--bpe", "gpt2", "--gpt2-encoder-json", encoder_files / "encoder.json"] if name == "gpt2" else []
    for blocks in BLOCKS.values():
        results = {}
        for unit, remove in (("token", []), ("word", ["--remove-bpe", name, *more])):
            path = texts / f"{unit}.json"
            done = run_cli("eval_lm", [*evaluation, *blocks, *remove, "--results-json", path])
            assert done.status == 0, done.stderr
            results[unit] = json.loads(path.read_text())
            assert results[unit]["unit"] == unit
        bits = results["token"]["loss_base2"] * results["token"]["count"]
        cut = 0
        if name in ("subword_nmt", "fastbpe"):  # fairseq's rule counts each part of a word that a sample's end cuts
            cut = results["word"]["count"] - words
            assert 0 <= cut <= results["word"]["scored_tokens"] // 16
            assert cut == 0 or f"{cut} words are cut" in done.stderr or blocks != BLOCKS["lines"]
        assert results["word"]["count"] == words + cut
        assert results["word"]["loss_base2"] == pytest.approx(bits / (words + cut), rel=1e-6)
        assert results["word"]["perplexity"] == pytest.approx(2 ** (bits / (words + cut)), rel=1e-5)
        assert not math.isnan(bits)


@pytest.mark.parametrize("name", NAMES)
def test_words_are_reported_as_the_text_has_them(run_cli: Any, texts: Path, encoder_files: Path, name: str) -> None:
    data, model = texts / "bin", texts / "model"
    assert preprocess(run_cli, texts, *flags(encoder_files, name), "--destdir", str(data)).status == 0
    assert run_cli("train", [data, *TRAIN, "--save-dir", model]).status == 0
    more = ["--bpe", "gpt2", "--gpt2-encoder-json", encoder_files / "encoder.json"] if name == "gpt2" else []
    evaluation = [data, "--path", model / "checkpoint_last.pt", "--no-progress-bar", "--sample-break-mode", "eos"]
    done = run_cli("eval_lm", [*evaluation, "--remove-bpe", name, *more, "--output-word-probs"])
    reported = {}
    for line in done.stderr.splitlines():
        if "\t" in line:
            number, _, words = line.rpartition(" | ")[2].partition(" ")
            reported[int(number)] = [word.rpartition(" [")[0] for word in words.split("\t")]
    lines = (texts / "test").read_text().splitlines()
    assert reported == {k: [*line.split(), "</s>"] for k, line in enumerate(lines)}


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_encodes_as_preprocess_did(run_cli: Any, texts: Path, encoder_files: Path, name: str) -> None:
    data, model = texts / "bin", texts / "model"
    assert preprocess(run_cli, texts, *flags(encoder_files, name), "--destdir", str(data)).status == 0
    assert run_cli("train", [data, *TRAIN, "--save-dir", model]).status == 0
    options = {flag.replace("-", "_"): path for flag, path in encoder_flags(encoder_files, name).items()}
    hub: GeneratorHubInterface = TransformerLanguageModel.from_pretrained(
        str(model), "checkpoint_last.pt", str(data), bpe=name, **options
    )
    dataset = data_utils.load_indexed_dataset(str(data / "test"), hub.src_dict)
    line = (texts / "test").read_text().splitlines()[0]
    assert hub.encode(line).tolist() == dataset[0].tolist()
    assert hub.decode(hub.encode(line)) == line


def test_encoder_flags_that_cannot_work_are_one_sentence(run_cli: Any, texts: Path, encoder_files: Path) -> None:
    for words, said in (
        (["--bpe", "sentencepiece"], "--sentencepiece-vocab: found nothing"),
        (["--bpe", "subword_nmt"], "--bpe-codes: found nothing"),
        (["--bpe", "gpt2"], "--gpt2-encoder-json: found nothing"),
        (["--bpe", "subword_nmt", "--bpe-codes", "none"], "none: no such file"),
        (["--bpe", "subword_nmt", "--bpe-codes", str(encoder_files / "codes"), "--bpe-separator", " "], "whitespace"),
        (["--tokenizer", "space", "--align-suffix", "align"], "--align-suffix"),
    ):
        assert said in preprocess(run_cli, texts, *words, "--destdir", str(texts / "bin")).error
        assert not (texts / "bin").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--remove-bpe", ""], "--remove-bpe: found ''"),
        (["--remove-bpe", " "], "--remove-bpe: found ' '"),
        (["--remove-bpe", "ing"], "--remove-bpe: found 'ing'"),
        (["--remove-bpe", "sentencpiece"], "--remove-bpe: found 'sentencpiece'"),
        (["--remove-bpe", "silence"], "--remove-bpe: found 'silence'"),
        (["--remove-bpe", "gpt2"], "--bpe gpt2 --gpt2-encoder-json FILE"),
        (["--bpe", "sentencepiece"], "--remove-bpe sentencepiece beside it"),
        (["--bpe", "sentencepiece", "--remove-bpe"], "--remove-bpe sentencepiece beside it"),
        (["--tokenizer", "moses"], "--tokenizer: found moses"),
    ],
)
def test_a_mark_that_cannot_be_one_is_refused(run_cli: Any, golden: Path, words: list[str], said: str) -> None:
    checkpoint = golden / "checkpoints" / "checkpoint_best.pt"
    assert said in run_cli("eval_lm", [golden / "data-bin", "--path", checkpoint, *words]).error


@pytest.mark.parametrize("mark", ["@@ ", "subword_nmt", "sentencepiece", "letter", "_EOW", "##", "wordpiece"])
def test_a_mark_that_the_dictionary_lacks_is_said(run_cli: Any, golden: Path, tmp_path: Path, mark: str) -> None:
    words = [golden / "data-bin", "--path", golden / "checkpoints" / "checkpoint_best.pt", "--remove-bpe", mark]
    done = run_cli("eval_lm", [*words, "--results-json", tmp_path / "r.json"])
    assert done.status == 0 and "joins nothing" in done.stderr and "counted per token" in done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["unit"] == "token" and results["count"] == results["scored_tokens"]
