"""A model with its datastore, of either kind, with the objects that write text with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq import options
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.texts import texts_of
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.retrieval.open_stores import open_stores
from fairseq.retrieval_steps import RetrievalSteps

FIXTURES = Path(__file__).parent.parent / "fixtures"
GOLDEN, GPT2 = FIXTURES / "golden", FIXTURES / "golden-hf" / "gpt2"
STRATEGIES = {
    "knnlm": "--no-pointer",
    "random_skip": "--strategy random_skip",
    "retomaton": "--min-knns 4",
    "retomaton with clusters": "--min-knns 4 --members",
    "chains": "--strategy retomaton_chains",
}


class Opened:
    """A model and a datastore; strategies are built on them as they are asked for."""

    def __init__(self, words: list[str], members: Path) -> None:
        self.words, self.members = words, str(members)
        args = self.args("")
        self.scoring = LMScoring.of_models(args)
        self.stores = open_stores(args, self.scoring.key_dimension)
        self.texts: Any = texts_of(self.scoring.task.source_dictionary, argparse.Namespace())
        self.symbols = self.texts.symbols

    def args(self, flags: str) -> argparse.Namespace:
        own = flags.replace("--members", f"--members {self.members}").split()
        return options.parse_args_and_arch(options.get_eval_lm_parser(), [*self.words, *own])

    def knnlm(self, flags: str = "", lmbda: float = 0.4) -> KNNLM:
        args = self.args(flags)
        args.lmbda = lmbda
        return build_knnlm(args, self.scoring.key_dimension, stores=self.stores)

    def positions(self, flags: str = "", lmbda: float = 0.4, retrieval: bool = True) -> Positions:
        steps = RetrievalSteps(self.knnlm(flags, lmbda)) if retrieval else None
        needs = frozenset() if steps is None else steps.retriever.needs
        lm = LMSteps(self.scoring.models, self.symbols.pad, self.texts.start, self.scoring.scorer.key_type, needs)
        return Positions(lm, steps)

    def evaluated(self, tokens: list[int], flags: str, lmbda: float = 0.4) -> Any:
        """What an evaluation says of a text with these tokens: RetrievalResult."""
        scoring = self.scoring.on_text([torch.tensor(tokens)])
        sequences = [sequence for batch in scoring.batches() for sequence in scoring.score(batch)]
        (result,) = self.knnlm(flags, lmbda).score(sequences)
        return result

    def prompts(self, text: str, lengths: tuple[int, ...] = (2, 7, 4, 1)) -> list[Tensor]:
        """The beginnings of a text's lines, in tokens."""
        lines = [self.texts.encode(line) for line in text.splitlines() if len(line.split()) > max(lengths)]
        return [line[:length] for line, length in zip(lines, lengths, strict=False)]


@pytest.fixture(scope="session")
def opened_fairseq() -> tuple[Opened, str]:
    checkpoints = GOLDEN / "checkpoints"
    files = f"--dstore-filename {checkpoints}/dstore16 --indexfile {checkpoints}/knn16.index --dstore-fp16"
    words = f"{GOLDEN}/data-bin --path {checkpoints}/checkpoint_best.pt --cpu --knnlm {files} --no-load-keys --k 64"
    text = (GOLDEN / "text" / "wiki.valid.tokens").read_text(encoding="utf-8")
    return Opened([*words.split(), "--knn-sim-func", "do_not_recomp_l2"], next(checkpoints.glob("*members*"))), text


@pytest.fixture(scope="session")
def opened_gpt2(tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any]) -> tuple[Opened, str]:
    pytest.importorskip("transformers", reason="Hugging Face models need the extra hf: pip install '.[hf]'")
    data = tmp_path_factory.mktemp("gpt2")
    text = FIXTURES / "golden-hf" / "text" / "wiki.valid.txt"
    flags = ["--only-source", "--hf-tokenizer", GPT2, "--validpref", text, "--destdir", data]
    assert run_cli("preprocess", flags).status == 0
    words = f"{data} --path {GPT2} --cpu --knnlm --dstore-dir {GPT2}/dstore --k 64 --probe 8 --no-load-keys"
    members = next((GPT2 / "clusters").glob("members*"))
    return Opened([*words.split(), "--knn-sim-func", "do_not_recomp_l2"], members), text.read_text(encoding="utf-8")


@pytest.fixture(scope="session", params=["fairseq", "huggingface"])
def opened(request: pytest.FixtureRequest) -> tuple[Opened, str]:
    """(model with a datastore, text of its kind)."""
    return request.getfixturevalue("opened_fairseq" if request.param == "fairseq" else "opened_gpt2")
