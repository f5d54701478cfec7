"""The command `fairseq-interactive`: what it prints with its flags, for both kinds of model."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.evaluation.entry_texts import StoredDocuments
from fairseq.files.sidecar import write_sidecar
from tests.generation.conftest import GOLDEN, GPT2

MODEL = f"--path {GOLDEN}/checkpoints/checkpoint_best.pt --cpu"
FILES = f"--dstore-filename {GOLDEN}/checkpoints/dstore16 --indexfile {GOLDEN}/checkpoints/knn16.index --dstore-fp16"
KNN = f"--knnlm {FILES} --no-load-keys --knn-sim-func do_not_recomp_l2 --k 16 --lmbda 0.3"
PROMPTS = ["the new brola was built by", "In 1849 , Zensu", "It is not known who sold"]


@pytest.fixture(scope="module")
def continued(run_cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """continued(flags): what the command leaves with three prompts in a file, by the small checkpoint; each is run
    once."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(prompt + "\n" for prompt in PROMPTS))
    known: dict[str, Any] = {}

    def run(flags: str) -> Any:
        if flags not in known:
            words = f"{GOLDEN}/data-bin {MODEL} --input {path} --max-len-b 6 {flags}"
            known[flags] = run_cli("interactive", words.split())
            assert known[flags].status == 0, known[flags].stderr
        return known[flags]

    return run


def texts(done: Any) -> list[str]:
    """The hypotheses."""
    return [line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("H-")]


def parsed(done: Any) -> list[dict[str, Any]]:
    """What `--json` printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def new_words(done: Any) -> list[list[str]]:
    """What was written after each prompt, with one hypothesis a prompt."""
    return [text.split()[len(prompt.split()) :] for text, prompt in zip(texts(done), PROMPTS, strict=True)]


@pytest.fixture(scope="module")
def objects(continued: Any) -> list[dict[str, Any]]:
    return parsed(continued(f"{KNN} --json"))


def test_lines_as_fairseq_prints_them(continued: Any) -> None:
    lines = continued(KNN).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"{kind}-{n}" for n in range(3) for kind in "SHP"]
    for number, prompt in enumerate(PROMPTS):
        source, hypothesis, scores = (line.split("\t") for line in lines[3 * number : 3 * number + 3])
        assert source[1] == prompt and len(hypothesis) == 3 and len(scores) == 2
        values = [float(score) for score in scores[1].split()]
        assert 0 < len(values) <= 6
        assert float(hypothesis[1]) == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_json_lines_are_the_same(continued: Any, objects: list[dict[str, Any]]) -> None:
    lines = continued(KNN).stdout.splitlines()
    assert [found["text"] for found in objects] == texts(continued(KNN))
    assert [(found["prompt"], found["sample"], found["prompt_text"]) for found in objects] == [
        (number, 0, prompt) for number, prompt in enumerate(PROMPTS)
    ]
    for found, line in zip(objects, lines[2::3], strict=True):
        printed = [f"{token['log_prob']:.4f}" for token in found["tokens"]]
        assert printed == line.split("\t")[1].split(" ")
        assert found["ended"] == (found["tokens"][-1]["token"] == "</s>")


def test_json_numbers_fit_together(objects: list[dict[str, Any]]) -> None:
    tokens = [token for found in objects for token in found["tokens"]]
    for token in tokens:
        knn = 0.0 if token["knn_log_prob"] is None else math.exp(token["knn_log_prob"])
        mixed = token["lmbda"] * knn + (1 - token["lmbda"]) * math.exp(token["lm_log_prob"])
        assert math.log(mixed) == pytest.approx(token["log_prob"], abs=1e-5)
        assert token["lmbda"] == pytest.approx(0.3)
        shares = [entry["share"] for entry in token["entries"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) < 1 + 1e-5
        assert len(shares) == min(5, token["candidates"])
        of_token = sum(entry["share"] for entry in token["entries"] if entry["token"] == token["id"])
        assert of_token <= knn + 1e-5
    assert any(token["searched"] for token in tokens) and not all(token["searched"] for token in tokens)


def test_entries_are_those_of_the_datastore(objects: list[dict[str, Any]], opened_fairseq: Any) -> None:
    lm, _ = opened_fairseq
    values, symbols = lm.stores.datastore.values, lm.scoring.task.source_dictionary
    for entry in (entry for found in objects for token in found["tokens"] for entry in token["entries"]):
        number = entry["entry"]
        assert entry["token"] == values[number] and entry["text"] == symbols[values[number]]
        before = [int(value) for value in values[max(0, number - 20) : number]]
        assert entry["context"] == lm.texts.decode(before)
        assert "document" not in entry  # of words, documents are not known


def test_without_retrieval(continued: Any) -> None:
    for token in (token for found in parsed(continued("--json")) for token in found["tokens"]):
        assert set(token) == {"id", "token", "log_prob", "lm_log_prob"}
        assert token["log_prob"] == token["lm_log_prob"]
    assert texts(continued("")) == texts(continued(KNN.replace("--lmbda 0.3", "--lmbda 0")))


@pytest.mark.parametrize("batch", [f"{KNN} --batch-size 3", f"{KNN} --buffer-size 2", f"{KNN} --draft 4"])
def test_what_is_continued_together_changes_nothing(continued: Any, batch: str) -> None:
    assert texts(continued(batch)) == texts(continued(KNN))


def test_several_continuations(continued: Any) -> None:
    best = continued(f"{KNN} --beam 3 --nbest 2")
    lines = best.stdout.splitlines()
    assert [line[:3] for line in lines] == [f"{kind}-{n}" for n in range(3) for kind in "SHPHP"]
    for number in range(3):
        first, second = (float(line.split("\t")[1]) for line in lines[5 * number : 5 * number + 5][1::2])
        assert first >= second
    assert len(set(texts(best))) == 6
    for own in parsed(continued(f"{KNN} --beam 3 --nbest 3 --unnormalized --json")):
        assert own["score"] == pytest.approx(sum(token["log_prob"] for token in own["tokens"]), abs=1e-4)


def test_samples_follow_the_seed(continued: Any) -> None:
    flags = f"{KNN} --sampling --beam 4 --nbest 4"
    first = texts(continued(f"{flags} --seed 3"))
    assert first == texts(continued(f"{flags} --seed 3 --batch-size 2"))
    assert first != texts(continued(f"{flags} --seed 4"))
    assert len(set(first)) > 6
    greedy = texts(continued(KNN))
    assert texts(continued(f"{KNN} --sampling --sampling-topk 1")) == greedy
    assert texts(continued(f"{KNN} --sampling --sampling-topp 1e-9 --temperature 0.7")) == greedy


def test_prefixes_and_lengths(continued: Any) -> None:
    cut = continued(f"{KNN} --prefix-size 2")
    assert [text.split()[:2] for text in texts(cut)] == [prompt.split()[:2] for prompt in PROMPTS]
    assert all(2 < len(text.split()) <= 8 for text in texts(cut))
    assert [line.split("\t")[1] for line in cut.stdout.splitlines()[::3]] == PROMPTS
    longest = continued("--max-len-a 1 --max-len-b 1 --min-len 99").stdout.splitlines()[2::3]
    assert [len(line.split("\t")[1].split()) for line in longest] == [len(prompt.split()) + 1 for prompt in PROMPTS]


@pytest.mark.parametrize("beam", [1, 2])
def test_no_end_before_its_time(continued: Any, beam: int) -> None:
    """Where a least length forbids the end even at the limit, beam search writes as far as that too."""
    found = parsed(continued(f"--max-len-a 0.1 --min-len 99 --json --beam {beam}"))
    assert len(found) == 3
    for own in found:
        assert len(own["tokens"]) == 6 and not own["ended"]
        assert "</s>" not in [token["token"] for token in own["tokens"]]


def test_penalties(continued: Any) -> None:
    assert any("<unk>" in words for words in new_words(continued("")))
    assert not any("<unk>" in words for words in new_words(continued("--unkpen 1000")))
    repeated = new_words(continued("--unkpen 1000 --max-len-b 30"))
    assert any(len(set(words)) < len(words) for words in repeated)
    for text in texts(continued("--unkpen 1000 --max-len-b 30 --no-repeat-ngram-size 1")):
        assert len(set(text.split())) == len(text.split())


def test_standard_input_and_results(
    continued: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(PROMPTS).encode())))
    results = tmp_path / "results.json"
    words = f"{GOLDEN}/data-bin {MODEL} --max-len-b 6 {KNN} --draft 4 --results-json {results}"
    done = run_cli("interactive", words.split())
    assert done.stdout == continued(f"{KNN} --draft 4").stdout
    found = json.loads(results.read_text())
    assert found["prompts"] == 3
    assert found["new_tokens"] == sum(len(line.split("\t")[1].split()) for line in done.stdout.splitlines()[2::3])
    assert 0 < found["searches"] < found["retrieved_tokens"] and found["drafts"]["passes"] > 0
    assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"])


def test_what_is_a_line(run_cli: Any, tmp_path: Path) -> None:
    """Line separators within a prompt separate words, as in a text that is preprocessed, and never lines of output."""
    prompt = "the new\u2028brola\u0085was\x0cbuilt\rby"
    (tmp_path / "p").write_bytes((prompt + "\n").encode())
    words = f"{GOLDEN}/data-bin {MODEL} --max-len-b 2 --input {tmp_path / 'p'}".split()
    done = run_cli("interactive", words)
    lines = done.stdout.splitlines()
    assert lines[0] == "S-0\tthe new\\u2028brola\\x85was\\x0cbuilt\\rby"
    assert len(lines) == 3 and lines[1].split("\t")[2].startswith("the new brola was built by ")
    (line,) = run_cli("interactive", [*words, "--json"]).stdout.splitlines()
    assert json.loads(line)["prompt_text"] == prompt


SAID = {
    "odd characters": ("the\u200b new\0 \ufeffbrola", "", "found 1 zero-width spaces (U+200B)", "found 1 NUL bytes"),
    "unknown words": ("the qqq new", "", "1 of 3 tokens are not in the dictionary", "read as <unk>"),
    "flags of an evaluation": ("the", "--gen-subset valid --context-window 8", "--context-window, --gen-subset"),
    "temperature": ("the", "--temperature 0.5", "--temperature has no effect on the likeliest token"),
    "penalties of lengths": ("the", "--lenpen 2 --unnormalized", "--lenpen has no effect", "--unnormalized has no"),
    "batches": ("the", "--beam 2 --batch-size 4", "--max-sentences has no effect with --beam"),
    "without retrieval": ("the", "--lmbda 0.3", "--knnlm is missing"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_has_no_effect_is_said(run_cli: Any, tmp_path: Path, case: str) -> None:
    prompt, flags, *sentences = SAID[case]
    (tmp_path / "p").write_text(prompt + "\n")
    words = f"{GOLDEN}/data-bin {MODEL} --max-len-b 1 --input {tmp_path / 'p'} {flags}"
    done = run_cli("interactive", words.split())
    assert done.status == 0 and done.stdout
    assert all(sentence in done.stderr for sentence in sentences), done.stderr


# -- what cannot be done

REFUSED: dict[str, tuple[Any, str, str]] = {
    "an empty prompt": (b"the\n\nnew\n", "", "prompt 1 without a word"),
    "a prompt of spaces": (b" \t \n", "", "prompt 0 without a word"),
    "a long prompt": (b"the " * 500, "", "prompt 0 of 500 tokens"),
    "no prompt": (b"", "", "found no prompt"),
    "no UTF-8": (b"the\n\xff\xfe\n", "", "bytes in prompt 1 that are no UTF-8"),
    "no file": (None, "", "p: no such file"),
    "a folder": (Path.mkdir, "", "p: a folder, not a file"),
    "a FIFO": (os.mkfifo, "", "p: found a FIFO"),
    "beam 0": (b"the\n", "--beam 0", "--beam"),
    "nbest": (b"the\n", "--beam 2 --nbest 3", "--nbest: found 3, expected at most --beam 2"),
    "no datastore": (b"the\n", "--knnlm", "--dstore-filename: found nothing"),
    "no index": (b"the\n", f"--knnlm --dstore-filename {GOLDEN}/checkpoints/dstore16", "--indexfile: found nothing"),
    "drafts alone": (b"the\n", "--draft 4", "--draft: found it alone"),
    "drafts of a beam": (b"the\n", f"{KNN} --draft 4 --beam 2", "--draft: found --beam 2 beside it"),
    "temperature 0": (b"the\n", "--temperature 0", "--temperature: found 0.0"),
    "temperature 0 of samples": (b"the\n", "--sampling --temperature 0", "leave out --sampling"),
    "topk 0": (b"the\n", "--sampling --sampling-topk 0", "--sampling-topk: found 0"),
    "topp 2": (b"the\n", "--sampling --sampling-topp 2", "--sampling-topp: found 2"),
    "topk without samples": (b"the\n", "--sampling-topk 3", "--sampling-topk: found 3 without --sampling"),
    "lengths": (b"the\n", "--min-len 9 --max-len-b 4", "--min-len: found 9, expected at most --max-len-b 4"),
    "pieces of words": (b"the\n", "--remove-bpe", "--remove-bpe: found it here"),
    **{
        f"of an evaluation: {flags}": (b"the\n", flags, f"{flags.split()[0]}: found an evaluation's flag")
        for flags in ("--save-scores s", "--target-foss 0.5", "--output-word-probs", "--max-length 8", "--check",
                      "--save-knnlm-dstore", "--index-recall 5")
    },
    "parts": (b"the\n", "--num-shards 2", "--num-shards: found parts of a text"),
    "results in a folder": (b"the\n", "--results-json .", "--results-json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence(run_cli: Any, tmp_path: Path, case: str) -> None:
    content, flags, sentence = REFUSED[case]
    prompts = tmp_path / "p"
    if isinstance(content, bytes):
        prompts.write_bytes(content)
    elif content is not None:
        content(prompts)
    words = f"{GOLDEN}/data-bin {MODEL} --max-len-b 2 --input {prompts} --results-json {tmp_path}/r.json {flags}"
    done = run_cli("interactive", words.split(), cwd=tmp_path)
    assert sentence in done.error
    assert done.stdout == ""  # of a file, nothing is written unless all of it can be
    assert {path.name for path in tmp_path.iterdir()} <= {"p"}


def test_the_datastore_of_another_model(run_cli: Any, tmp_path: Path) -> None:
    """A datastore whose sidecar names other weights."""
    for name in ("dstore16_keys.npy", "dstore16_vals.npy", "knn16.index"):
        (tmp_path / name).symlink_to(GOLDEN / "checkpoints" / name)
    own = {"rows": 16938, "dimension": 32, "key_dtype": "<f2", "value_dtype": "<i2", "weights": ["0" * 32]}
    write_sidecar(str(tmp_path / "dstore16"), "datastore", own)
    (tmp_path / "p").write_text("the\n")
    words = f"{GOLDEN}/data-bin {MODEL} --input {tmp_path}/p " + KNN.replace(f"{GOLDEN}/checkpoints", str(tmp_path))
    assert "saved with the weights 0000" in run_cli("interactive", words.split()).error


def test_nobody_reads_on(run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that goes away, as `head` does, is one sentence."""
    read, write = os.pipe()
    os.close(read)
    (tmp_path / "p").write_text("the\n")
    from fairseq_cli import interactive

    inside, main = interactive.main, []

    def with_pipe(args: Any) -> Any:
        main.append(sys.stdout)
        sys.stdout = os.fdopen(write, "w")
        return inside(args)

    monkeypatch.setattr(interactive, "main", with_pipe)
    done = run_cli("interactive", f"{GOLDEN}/data-bin {MODEL} --input {tmp_path}/p --max-len-b 1".split())
    assert done.error.endswith("error: Broken pipe")


# -- models of transformers


@pytest.fixture(scope="module")
def of_gpt2(opened_gpt2: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """of_gpt2(flags, prompts): the same with a Hugging Face model."""
    lm, text = opened_gpt2
    lines = [" ".join(line.split()[:6]) for line in text.splitlines() if len(line.split()) > 9][:2]
    path = tmp_path_factory.mktemp("prompts") / "p"
    path.write_text("".join(line + "\n" for line in lines))

    def run(flags: str, model: Path = GPT2) -> Any:
        words = " ".join(lm.words).replace(f"--path {GPT2}", f"--path {model}")
        return run_cli("interactive", f"{words} --lmbda 0.4 --input {path} --max-len-b 6 {flags}".split())

    return run


def test_a_model_of_transformers(of_gpt2: Any) -> None:
    plain = of_gpt2("")
    assert plain.status == 0, plain.stderr
    assert texts(plain) == texts(of_gpt2("--batch-size 2")) == texts(of_gpt2("--draft 4"))
    found = parsed(of_gpt2("--json --beam 2"))
    assert len(found) == 2 and all(token["entries"] for own in found for token in own["tokens"])


def test_entries_name_their_documents(run_cli: Any, opened_gpt2: Any, tmp_path: Path) -> None:
    """Of a datastore that was saved from the documents of the data folder, and only where that is certain."""
    lines = (GPT2.parent / "text" / "wiki.train.txt").read_text().splitlines()[:150]
    records = [{"text": line, "id": f"page\\{n}"} for n, line in enumerate(lines) if line.strip()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cut = f"--only-source --hf-tokenizer {GPT2} --trainpref {tmp_path}/train.jsonl --destdir {tmp_path}/bin".split()
    assert run_cli("preprocess", cut).status == 0
    save = "--context-window 32 --tokens-per-sample 32 --save-knnlm-dstore --dstore-mmap"
    words = f"{tmp_path}/bin --path {GPT2} --cpu --gen-subset train --no-progress-bar {save} {tmp_path}/own"
    assert run_cli("eval_lm", words.split()).status == 0
    (tmp_path / "p").write_text("The rormeish laira\n")
    store = f"--knnlm --dstore-filename {tmp_path}/own --index exact --k 8 --lmbda 0.3"
    ask = f"{tmp_path}/bin --path {GPT2} --cpu --input {tmp_path}/p --max-len-b 4 --json {store}".split()
    documents = MMapIndexedDataset(str(tmp_path / "bin" / "train"))
    (found,) = parsed(run_cli("interactive", ask))
    for entry in (entry for token in found["tokens"] for entry in token["entries"]):
        number, place = entry["document"], entry["document_position"]
        assert documents[number][place] == entry["token"]
        assert entry["document_name"] == records[number]["id"]
        assert documents.sizes[:number].sum() + place == entry["entry"] + 32  # a sample without context is not stored

    sidecar = json.loads((tmp_path / "own.json").read_text())
    others = {"sample_break_mode": "eos", "data": {}, "filled_rows": 5, "max_length": 64, "split": "test"}
    for change in ({name: value} for name, value in others.items()):
        changed = {name: value for name, value in {**sidecar, **change}.items() if name != "digest"}
        write_sidecar(str(tmp_path / "own"), "datastore", changed)
        assert StoredDocuments.of_datastore(str(tmp_path / "own"), str(tmp_path / "bin"), sidecar["vocabulary"]) is None


def test_special_tokens_of_a_prompt_are_said(of_gpt2: Any, opened_gpt2: Any, tmp_path: Path) -> None:
    lm, _ = opened_gpt2
    (tmp_path / "p").write_text(f"The {lm.texts.tokenizer.eos_token} laira\n")
    done = of_gpt2(f"--input {tmp_path / 'p'}")
    assert done.status == 0 and "found 1 special tokens, which prompts spell out" in done.stderr
    assert "special tokens" not in of_gpt2("").stderr


REFUSED_WITH_GPT2 = {"--remove-bpe": "--remove-bpe: found", "--bpe gpt2": "--bpe: found"}


@pytest.mark.parametrize("flags", REFUSED_WITH_GPT2)
def test_words_are_the_tokenizers_affair(of_gpt2: Any, flags: str) -> None:
    assert REFUSED_WITH_GPT2[flags] in of_gpt2(flags).error


def test_a_tokenizer_without_an_end(run_cli: Any, tmp_path: Path, opened_gpt2: Any) -> None:
    """A text then ends at the limit alone, in beam search too."""
    model = tmp_path / "model"
    shutil.copytree(GPT2, model, ignore=shutil.ignore_patterns("dstore*", "clusters"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    (tmp_path / "p").write_text("The rormeish laira\nof\n")
    cut = ["--only-source", "--hf-tokenizer", model, "--testpref", tmp_path / "p", "--destdir", tmp_path / "bin"]
    assert run_cli("preprocess", [*cut, "--hf-eos", "none"]).status == 0
    for flags in ("", "--beam 2 --nbest 2", "--batch-size 2"):
        words = f"{tmp_path}/bin --path {model} --cpu --input {tmp_path}/p --max-len-b 5 --json {flags}"
        done = run_cli("interactive", words.split())
        assert done.status == 0, done.stderr
        assert [(len(own["tokens"]), own["ended"]) for own in parsed(done)] == [(5, False)] * len(parsed(done))
        assert len(parsed(done)) == (4 if "beam" in flags else 2)


def test_a_text_of_words(opened_gpt2: Any, run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("the\n")
    done = run_cli("interactive", f"{GOLDEN}/data-bin --path {GPT2} --cpu --input {tmp_path}/p".split())
    assert "preprocess the text with --hf-tokenizer" in done.error
