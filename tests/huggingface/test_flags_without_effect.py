"""Flags that mean nothing with a Hugging Face model, or with its tokenizer: refused, or named in a warning; and
what the log says of how the text was cut."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from fairseq import options
from fairseq.flags.layouts import PREPROCESSING

QUIET = ["--no-progress-bar", "--cpu", "--gen-subset", "valid"]
OF_WORDS = " ".join(PREPROCESSING.groups[group] for group in ("Words", "Dictionary")).split()


def argument_of(flag: str) -> list[str]:
    """What a user might give with the flag: nothing for a switch, one of the choices, or 5."""
    (action,) = [each for each in options.get_preprocessing_parser()._actions if flag in each.option_strings]
    if isinstance(action, argparse._StoreTrueAction):
        return []
    return [str(next(iter(action.choices)))] if action.choices else ["5"]


@pytest.mark.parametrize("flag", OF_WORDS)
def test_flags_of_a_dictionary_with_a_tokenizer(flag: str, golden_hf: Path, tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "text").write_text("some text\n")
    common = ["--only-source", "--hf-tokenizer", golden_hf / "gpt2", "--trainpref", tmp_path / "text"]
    done = run_cli("preprocess", [*common, "--destdir", tmp_path / "bin", flag, *argument_of(flag)])
    assert f"{flag}: found" in done.error and "nothing with --hf-tokenizer" in done.error
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize("how", [[], ["--dataset-impl", "raw"], ["--dict-only"], ["--srcdict", "dict.txt"]])
def test_words_beside_a_text_of_a_tokenizer(how: list[str], binarised: Any, golden_hf: Path, tmp_path: Path,
                                            run_cli: Any) -> None:
    data = binarised(golden_hf / "gpt2")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    (tmp_path / "text").write_text("some text\n")
    common = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", data]
    done = run_cli("preprocess", [*common, *how])
    assert "which holds a text of a tokenizer, expected a folder of its own" in done.error
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


OVERRIDES = {  # what is given -> the names that a warning has to name
    "{'n_head': 4, 'nosuch': 3}": ["n_head", "nosuch"],
    "{'decoder_layers': 2}": ["decoder_layers"],
    "{'add_bos_token': True}": ["add_bos_token"],
    "{'max_tokens': 99, 'tokens_per_sample': 64}": ["max_tokens"],
    "{'tokens_per_sample': 64}": [],
    "{'knn_keytype': 'final_hidden'}": [],
}


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_overrides(overrides: str, binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    command = [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", *QUIET, "--model-overrides", overrides]
    done = run_cli("eval_lm", command)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "has no effect" in line]
    assert done.status == 0 and len(said) == len(OVERRIDES[overrides])
    for name, line in zip(OVERRIDES[overrides], said):
        assert f"--model-overrides: '{name}' has no effect with a Hugging Face model" in line


def test_a_token_before_the_text(binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    command = [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", *QUIET, "--add-bos-token"]
    done = run_cli("eval_lm", command)
    assert "--add-bos-token has no effect with a Hugging Face model: a BOS stands" in done.stdout + done.stderr
    assert "--model-overrides" not in done.stdout.partition("{")[0] + done.stderr.partition("{")[0]


CUTS = {
    "": "samples of up to 128 tokens after at least 0 of context",
    "--context-window 32 --tokens-per-sample 40": "samples of up to 40 tokens after at least 32 of context",
    "--max-length 64": "windows of up to 64 tokens, a scored token after at least 1 of context",
    "--max-length 64 --stride 16": "windows of up to 64 tokens, a scored token after at least 48 of context",
    "--max-length 64 --rolling": "windows of up to 64 tokens, a scored token after at least 1 of context",
}


@pytest.mark.parametrize("flags", CUTS)
def test_how_the_text_was_cut(flags: str, binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    done = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", *QUIET, *flags.split()])
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "scored " in line and "counted per" in line]
    assert line.endswith(CUTS[flags])
