"""The perplexity that each community states, from the flags that docs/perplexity.md names, against what the programs of
that community gave; and that the convention that results name is the one by which they were made."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.evaluation.lm_scoring import LMScoring
from tests.huggingface.conftest import GOLDEN_HF, QUIET

EXPECTED = json.loads((GOLDEN_HF / "expected.json").read_text())
CONVENTIONS = EXPECTED["lm_conventions"]
MODELS = ["gpt2", "llama"]


# -- numbers that other programs gave


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", [0, 1])
def test_windows_of_the_hugging_face_docs(
    binarised: Any, golden_hf: Path, evaluate: Any, model: str, number: int
) -> None:
    expected = CONVENTIONS[model]["hf_docs"][number]
    data = binarised(golden_hf / model, "file", "none")
    flags = ["--gen-subset", "valid", "--max-length", expected["max_length"], "--stride", expected["stride"]]
    results = evaluate(data, golden_hf / model, *flags)
    assert results["scored_tokens"] == expected["exact_n_tokens"]
    assert results["perplexity"] == pytest.approx(expected["exact_token_perplexity"], rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_rolling_log_likelihood_of_a_text(binarised: Any, golden_hf: Path, evaluate: Any, model: str) -> None:
    """lm-evaluation-harness, one document."""
    expected = CONVENTIONS[model]["lm_eval_whole_text"]
    data = binarised(golden_hf / model, "file", "none")
    _agrees_with_lm_eval(evaluate(data, golden_hf / model, "--gen-subset", "valid", "--max-length", 128, "--rolling"),
                         expected)


@pytest.mark.parametrize("model", MODELS)
def test_rolling_log_likelihood_of_documents(
    golden_hf: Path, evaluate: Any, run_cli: Any, tmp_path: Path, model: str
) -> None:
    """lm-evaluation-harness, ten documents, each after its own prefix token."""
    articles = re.split(r"(?m)^(?== [^=])", (golden_hf / "text/wiki.valid.txt").read_text())[1:]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    where = ["--hf-tokenizer", golden_hf / model, "--validpref", tmp_path / "valid.jsonl", "--destdir", tmp_path / "b"]
    assert run_cli("preprocess", ["--only-source", "--hf-eos", "none", *where]).status == 0
    flags = ["--gen-subset", "valid", "--max-length", 128, "--rolling", "--group-documents", 1]
    expected = CONVENTIONS[model]["lm_eval_articles"]
    results = evaluate(tmp_path / "b", golden_hf / model, *flags)
    _agrees_with_lm_eval(results, expected)
    assert results["perplexities"]["convention"]["texts"] == "of 1 documents"
    table = np.load(tmp_path / "b/valid.documents.npy")
    assert table[:, 1].tolist() == expected["bytes"] and table[:, 3].tolist() == expected["words"]


def _agrees_with_lm_eval(results: dict[str, Any], expected: dict[str, Any]) -> None:
    found = results["perplexities"]
    assert results["scored_tokens"] == found["tokens"] == sum(expected["tokens"])
    assert -found["nats"] == pytest.approx(sum(expected["loglikelihood"]), rel=1e-6)
    assert (found["bytes"], found["lm_eval_words"]) == (sum(expected["bytes"]), sum(expected["words"]))
    assert found["byte_perplexity"] == pytest.approx(expected["byte_perplexity"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert found["lm_eval_word_perplexity"] == pytest.approx(expected["word_perplexity"], rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["base", "base_stride128"])
def test_windows_of_knn_transformers(
    binarised: Any, golden_hf: Path, evaluate: Any, model: str, name: str
) -> None:
    expected = EXPECTED[model]["settings"][name]
    argv = expected["argv"]
    block, stride = (argv[argv.index(flag) + 1] for flag in ("--block_size", "--stride"))
    flags = ["--gen-subset", "valid", "--max-length", block, "--stride", stride, "--drop-remainder"]
    results = evaluate(binarised(golden_hf / model), golden_hf / model, *flags, "--group-documents", 1000)
    loss = results["loss_base2"] * math.log(2)
    assert loss == pytest.approx(expected["token_weighted_loss"], abs=1e-5)
    assert results["perplexities"]["word_perplexity"] is None  # not all of the text is scored


@pytest.mark.parametrize("context, tokens", [(0, 128), (64, 64), (96, 16)])
def test_blocks_of_fairseq(binarised: Any, golden_hf: Path, evaluate: Any, context: int, tokens: int) -> None:
    """Every token once, in blocks, the begin token before the first: a loop over transformers' own forward pass."""
    from transformers import AutoModelForCausalLM

    data = binarised(golden_hf / "llama", "line", "document")
    flags = ["--gen-subset", "valid", "--context-window", context, "--tokens-per-sample", tokens]
    results = evaluate(data, golden_hf / "llama", *flags)
    network = AutoModelForCausalLM.from_pretrained(golden_hf / "llama", dtype=torch.float32)
    stream = torch.from_numpy(np.fromfile(data / "valid.bin", np.uint16).astype(np.int64))
    source, total = torch.cat([torch.tensor([1]), stream[:-1]]), 0.0
    with torch.no_grad():
        for start in range(0, len(stream), tokens):
            before = max(0, start - context)
            log_probs = network(source[None, before : start + tokens]).logits[0].log_softmax(-1)[start - before :]
            total += float(log_probs.gather(1, stream[start : start + tokens, None]).sum())
    assert results["scored_tokens"] == len(stream)
    assert results["perplexities"]["nats"] == pytest.approx(-total, rel=1e-6)


# -- what results say of themselves

WAYS: dict[str, list[Any]] = {
    "blocks": ["--tokens-per-sample", 96],
    "blocks after a context": ["--context-window", 24, "--tokens-per-sample", 96],
    "documents": ["--sample-break-mode", "eos"],
    "whole documents": ["--sample-break-mode", "complete", "--tokens-per-sample", 96],
    "windows": ["--max-length", 100, "--stride", 30],
    "windows side by side": ["--max-length", 100],
    "windows of groups": ["--max-length", 100, "--stride", 100, "--drop-remainder", "--group-documents", 50],
    "a remainder left out": ["--max-length", 100, "--stride", 50, "--drop-remainder"],
    "rolling": ["--max-length", 100, "--rolling"],
    "rolling documents": ["--max-length", 100, "--rolling", "--group-documents", 1],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_convention_holds(way: str, binarised: Any, golden_hf: Path) -> None:
    """Least context, begin token, first token and remainder, read off the batches that the model gets."""
    data = binarised(golden_hf / "gpt2")
    words = [data, "--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET, *WAYS[way]]
    scoring = LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), [str(word) for word in words]))
    stream, begin = np.fromfile(data / "valid.bin", np.uint16), scoring.task.source_dictionary.eos()
    said, dataset, position = scoring.convention, scoring.dataset, 0
    contexts, first_inputs, rows, longest = [], [], 0, 0
    for batch in scoring.batches():
        starts = batch.get("start_indices", [0] * len(batch["id"]))
        for row, (number, start) in enumerate(zip(batch["id"].tolist(), starts)):
            source, target = batch["net_input"]["src_tokens"][row], batch["target"][row]
            if hasattr(dataset, "bounds"):  # where in its text the first scored token is
                text = dataset._text_starts[dataset._text_starts <= dataset.bounds[number, 1]].max()
                place = int(dataset.bounds[number, 1] - text)
            else:
                place = 0 if said.get("samples") == "eos" else position
            before = int(said["before_first_token"] != "nothing")
            if start + 1 < place + before:  # it does not see all of its text
                contexts.append(start + 1)
            first_inputs.append(int(source[0]))
            longest = max(longest, int((source != -1).sum()))
            position, rows = position + int((target[start:] != -1).sum()), rows + 1
    block = said.get("block", said.get("longest_sample"))
    assert longest <= block and (longest >= block - 1 or way == "rolling documents")
    assert not contexts or min(contexts) == said["context"]
    assert bool(contexts) == (way not in ("documents", "rolling documents"))
    dropped = int(said["remainder"].split()[0]) if "not scored" in said["remainder"] else 0
    assert bool(dropped) == ("--drop-remainder" in WAYS[way])
    if said["first_token"] == "scored":
        assert position == len(stream) and begin in first_inputs
    elif said["first_token"] == "not scored":
        assert position == len(stream) - dropped - 1
    else:
        windows = rows if "texts" in said else -(-len(stream) // said["block"])  # one may have a single token
        assert position == len(stream) - dropped - windows


def test_stride_and_length_are_context_and_block(binarised: Any, golden_hf: Path) -> None:
    """Windows of L tokens that move by S score what blocks of S tokens after a context of L - S - 1 more do, once a
    whole window lies in the text."""

    def log_probs(*flags: Any) -> torch.Tensor:
        words = [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET, *flags]
        scoring = LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), [str(word) for word in words]))
        return torch.cat([one.lm_log_probs for batch in scoring.batches() for one in scoring.score(batch)])

    windows = log_probs("--max-length", 128, "--stride", 32)
    blocks = log_probs("--context-window", 95, "--tokens-per-sample", 32)
    assert len(windows) == len(blocks) - 1
    torch.testing.assert_close(windows[127:], blocks[128:], atol=1e-4, rtol=1e-5)
    assert (windows[:95] - blocks[1:96]).abs().max() > 1e-3  # there the blocks begin with another token
