"""Tests of Hugging Face models. They need the extra `hf`, and no network: models are those of the fixtures, or random
ones that the tests make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
GOLDEN_HF = Path(__file__).parent.parent / "fixtures" / "golden-hf"
QUIET = ["--no-progress-bar", "--cpu"]


@pytest.fixture(scope="session", autouse=True)
def needs_transformers() -> None:
    """Skips what needs the extra, where it is not installed."""
    pytest.importorskip("transformers", reason="Hugging Face models need the extra hf: pip install '.[hf]'")


@pytest.fixture(scope="session")
def golden_hf() -> Path:
    """Two tiny models with a peer's files and numbers (its README says what they are). Only read from it."""
    return GOLDEN_HF


@pytest.fixture(scope="session")
def binarised(tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any]) -> Callable[..., Path]:
    """binarised(model, documents="line-with-end", eos="none"): a data folder of the fixture's texts, made once."""
    made: dict[Any, Path] = {}

    def make(model: Path, documents: str = "line-with-end", eos: str = "none") -> Path:
        key = (model, documents, eos)
        if key not in made:
            folder = tmp_path_factory.mktemp("bin")
            texts = ["--trainpref", GOLDEN_HF / "text/wiki.train.txt", "--validpref", GOLDEN_HF / "text/wiki.valid.txt"]
            how = ["--hf-documents", documents, "--hf-eos", eos, "--destdir", folder]
            done = run_cli("preprocess", ["--only-source", "--hf-tokenizer", model, *texts, *how])
            assert done.status == 0, done.stderr
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def evaluate(run_cli: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def evaluate(data: Path, model: Path, *flags: Any) -> dict[str, Any]:
        results = tmp_path / "results.json"
        done = run_cli("eval_lm", [data, "--path", model, *QUIET, "--results-json", results, *flags])
        assert done.status == 0, done.stderr
        return json.loads(results.read_text())

    return evaluate
