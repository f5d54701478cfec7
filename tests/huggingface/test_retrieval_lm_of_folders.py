"""RetrievalLM on a model folder of transformers: the numbers of eval_lm.py, neighbours and continuations as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.retrieval_lm import RetrievalLM
from tests.huggingface.conftest import GOLDEN_HF

SETTINGS: dict[str, Any] = {"no_load_keys": True, "knn_sim_func": "do_not_recomp_l2", "k": 128, "lmbda": 0.25}
TEXT = (GOLDEN_HF / "text/wiki.valid.txt").read_text()


def opened(binarised: Any, model: str, **settings: Any) -> RetrievalLM:
    data = binarised(GOLDEN_HF / model, "file", "none")
    given = {"dstore_dir": str(GOLDEN_HF / model / "dstore"), **SETTINGS, **settings}
    return RetrievalLM.open(str(GOLDEN_HF / model), str(data), cpu=True, **given)


@pytest.mark.parametrize("settings", [{"strategy": "knnlm"}, {"min_knns": 1}], ids=["knnlm", "retomaton"])
def test_a_text_scores_as_its_split_does(
    binarised: Any, run_cli: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    where = [binarised(GOLDEN_HF / "gpt2", "file", "none"), "--path", GOLDEN_HF / "gpt2", "--gen-subset", "valid"]
    how = "--knnlm --no-load-keys --knn-sim-func do_not_recomp_l2 --k 128 --lmbda 0.25 --cpu --no-progress-bar".split()
    how += [str(word) for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]
    files = ["--dstore-dir", GOLDEN_HF / "gpt2/dstore", "--results-json", tmp_path / "r.json"]
    done = run_cli("eval_lm", [*where, *how, *files])
    assert done.status == 0, done.stderr
    told = json.loads((tmp_path / "r.json").read_text())
    scored = opened(binarised, "gpt2", **settings).score_text(TEXT)
    assert len(scored.tokens) == told["scored_tokens"] == 1801
    assert scored.perplexity == pytest.approx(told["perplexity"], rel=1e-5)
    assert 100 * scored.searches_saved == pytest.approx(told["searches_saved_percent"])
    assert "".join(scored.tokens) == TEXT


def test_neighbours_are_shown_as_text(binarised: Any) -> None:
    lm = opened(binarised, "llama")
    near = lm.neighbours("In 1826 , Sabro left the", k=4)
    assert len(near) == 4 and [one.distance for one in near] == sorted(one.distance for one in near)
    train = " ".join((GOLDEN_HF / "text/wiki.train.txt").read_text().split())
    for one in near:
        assert one.context.split()[-2:] and " ".join(one.context.split()[-2:]) in train


def test_a_prompt_goes_on(binarised: Any) -> None:
    lm = opened(binarised, "gpt2", strategy="knnlm", tie_order="stable")
    text = lm.continue_text("In 1826 , Sabro", max_len_b=12)
    assert text.startswith("In 1826 , Sabro ") and len(text.split()) > 6
    assert lm.continue_text("In 1826 , Sabro", max_len_b=12) == text
    assert lm.continue_text("In 1826 , Sabro", max_len_b=0) == "In 1826 , Sabro"


def test_without_a_datastore_it_is_the_model(binarised: Any) -> None:
    data = binarised(GOLDEN_HF / "gpt2", "file", "none")
    lm = RetrievalLM.open(str(GOLDEN_HF / "gpt2"), str(data), cpu=True)
    network, prompt = lm.scoring.models[0].decoder.network, lm.texts.encode("The southern")
    tokens = torch.cat([torch.tensor([0]), prompt])[None]
    expected = network.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    written = lm.continue_text("The southern", max_len_b=8)
    assert written == lm.texts.decode(expected)
