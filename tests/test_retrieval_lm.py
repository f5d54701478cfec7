"""RetrievalLM: the numbers of eval_lm.py from Python, neighbours with their text, and text written with retrieval."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.errors import UserError
from fairseq.generation.positions import Positions
from fairseq.retrieval_lm import RetrievalLM
from fairseq.retrieval_steps import RetrievalSteps
from fairseq_cli import eval_lm

GOLDEN = Path(__file__).resolve().parent / "fixtures" / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
SETTINGS: dict[str, Any] = {
    "dstore_filename": CHECKPOINTS / "dstore16",
    "indexfile": CHECKPOINTS / "knn16.index",
    "knn_sim_func": "do_not_recomp_l2",
    "k": 64,
    "lmbda": 0.25,
    "dstore_fp16": True,
    "no_load_keys": True,
}
TEXT = (GOLDEN / "text" / "wiki.valid.tokens").read_text(encoding="utf-8")


def opened(**settings: Any) -> RetrievalLM:
    path, data = CHECKPOINTS / "checkpoint_best.pt", GOLDEN / "data-bin"
    return RetrievalLM.open(str(path), str(data), cpu=True, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def lm() -> RetrievalLM:
    return opened()


def evaluated(tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What eval_lm.py says of the valid split."""
    files = ["--path", str(CHECKPOINTS / "checkpoint_best.pt"), "--gen-subset", "valid", "--cpu", "--no-progress-bar"]
    words = [str(GOLDEN / "data-bin"), *files, "--results-json", str(tmp_path / "r.json"), *flags]
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
    eval_lm.main(args)
    return json.loads((tmp_path / "r.json").read_text())


def test_a_text_scores_as_its_split_does(tmp_path: Path, lm: RetrievalLM) -> None:
    own = lm.score_text(TEXT)
    flags = f"--knnlm --dstore-filename {CHECKPOINTS}/dstore16 --indexfile {CHECKPOINTS}/knn16.index --dstore-fp16"
    told = evaluated(tmp_path, *flags.split(), *"--k 64 --lmbda 0.25 --knn-sim-func do_not_recomp_l2".split())
    assert len(own.tokens) == told["count"]
    assert math.log2(own.perplexity) == pytest.approx(told["loss_base2"], abs=1e-6)
    assert own.searches_saved == pytest.approx(told["searches_saved_percent"] / 100, abs=1e-9)


def test_what_a_scored_text_says_fits_together(lm: RetrievalLM) -> None:
    scored = lm.score_text(TEXT.splitlines()[1] if TEXT.splitlines()[1].split() else TEXT[:400])
    total = {len(getattr(scored, name)) for name in ("tokens", "log_probs", "lm_log_probs", "lmbda", "searched")}
    assert len(total) == 1
    mixed = np.logaddexp(np.log1p(-scored.lmbda) + scored.lm_log_probs, np.log(scored.lmbda) + scored.knn_log_probs)
    np.testing.assert_allclose(scored.log_probs, mixed, atol=1e-5)
    assert scored.tokens[-1] == "</s>"
    assert scored.perplexity > 1 and scored.lm_perplexity > 1


def test_neighbours_are_the_nearest_with_their_text(lm: RetrievalLM) -> None:
    """A context of the training text has its own entry nearest, as far as the index is exact."""
    exact = opened(index="exact", indexfile=None, no_load_keys=False, knn_sim_func=None)
    assert exact.knnlm is not None
    near = exact.neighbours("the", k=5)
    assert len(near) == 5
    assert [one.distance for one in near] == sorted(one.distance for one in near)
    values = exact.knnlm.values
    for one in near:
        assert exact.dictionary.index(one.token) == int(values[one.entry])
        assert len(one.context.split()) <= 20
    assert [one.entry for one in lm.neighbours("the", k=3)] != []


def test_without_a_datastore_it_is_the_model() -> None:
    alone = opened(dstore_filename=None, indexfile=None)
    scored = alone.score_text("the the")
    np.testing.assert_array_equal(scored.log_probs, scored.lm_log_probs)
    assert (scored.lmbda == 0).all() and not scored.searched.any()
    with pytest.raises(UserError, match="opened without a datastore"):
        alone.neighbours("the")


@pytest.mark.parametrize("strategy", ["knnlm", "random_skip", "retomaton", "retomaton_chains"])
def test_the_distribution_of_writing_is_that_of_scoring(strategy: str) -> None:
    """Token by token: p of all words sums to one, and p of the right one is what an evaluation computes."""
    lm = opened(strategy=strategy)
    text = " ".join(TEXT.split()[40:70])
    scored = lm.score_text(text)
    tokens = lm._prompt(text)
    positions = Positions(lm._lm, RetrievalSteps(lm.knnlm))
    position = positions.begin([tokens[:0]])
    for place, token in enumerate(tokens):
        mixed = position.log_probs[0]
        assert float(mixed.exp().sum()) == pytest.approx(1, abs=1e-5)
        assert float(mixed[token]) == pytest.approx(float(scored.log_probs[place]), abs=1e-4)
        position = positions.choose(token[None], torch.zeros(1, dtype=torch.int64))


def test_what_is_written_begins_with_the_prompt_and_repeats(lm: RetrievalLM) -> None:
    prompt = " ".join(TEXT.split()[40:46])
    text = lm.continue_text(prompt, max_len_b=12)
    assert text.startswith(prompt) and 6 < len(text.split()) <= 18
    assert lm.continue_text(prompt, max_len_b=12) == text
    assert lm.continue_text(prompt, max_len_b=0) == prompt


def test_sampling_follows_the_seed(lm: RetrievalLM) -> None:
    prompt = " ".join(TEXT.split()[40:44])
    drawn = [lm.continue_text(prompt, 15, sampling=True, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_lambda_zero_writes_what_the_model_writes() -> None:
    prompt = " ".join(TEXT.split()[:5])
    alone = opened(dstore_filename=None, indexfile=None)
    texts = {lm.continue_text(prompt, 10) for lm in (opened(lmbda=0), alone)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda: opened(indexfile=None), "--indexfile: found nothing"),
        (lambda: opened(k=0), "--k"),
        (lambda: opened(kk=3), "--kk"),
        (lambda: opened(strategy="none"), "--strategy"),
        (lambda: opened().score_text("  \n "), "expected at least one word"),
        (lambda: opened().continue_text("the " * 5000), "expected at most the model's"),
    ],
)
def test_mistakes_are_one_sentence(do: Any, said: str) -> None:
    logging.disable(logging.NOTSET)
    with pytest.raises(UserError) as raised:
        do()
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_state_is_not_shared_between_texts(lm: RetrievalLM) -> None:
    text = " ".join(TEXT.split()[:30])
    first = lm.score_text(text)
    lm.continue_text(text, 5)
    again = lm.score_text(text)
    np.testing.assert_array_equal(first.log_probs, again.log_probs)
    assert torch.equal(torch.from_numpy(first.searched), torch.from_numpy(again.searched))


ODD = {"a\0b": "1 NUL bytes", "\ufeffa b": "1 byte order marks", "a\u200bb": "1 zero-width spaces"}


@pytest.mark.parametrize("text", ODD)
def test_odd_characters_are_said(text: str, lm: RetrievalLM, caplog: pytest.LogCaptureFixture) -> None:
    for use in (lm.score_text, lm.neighbours, lambda text: lm.continue_text(text, max_len_b=1)):
        caplog.clear()
        use(text)
        assert f"text: found {ODD[text]}" in caplog.text


def test_lines_end_as_preprocess_ends_them(lm: RetrievalLM, caplog: pytest.LogCaptureFixture) -> None:
    """U+2028, U+0085 and the like separate words; a carriage return alone ends a line, with a warning."""
    tokens = lm.score_text("the\u2028the\x85the\x0cthe\nthe\r\nthe\n").tokens
    assert tokens == ["the"] * 4 + ["</s>", "the", "</s>", "the", "</s>"] and "found" not in caplog.text
    assert lm.score_text("the\rthe").tokens == ["the", "</s>"] * 2
    assert "1 carriage returns that no line feed follows, which end lines" in caplog.text
