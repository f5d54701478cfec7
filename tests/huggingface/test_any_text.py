"""What a program passes to RetrievalLM: any text of a Hugging Face model is right, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq.errors import UserError
from fairseq.generation.choice import ChoiceSettings
from fairseq.retrieval_lm import RetrievalLM
from tests.huggingface.conftest import GOLDEN_HF

SPECIAL = {"gpt2": "<|endoftext|>", "llama": "</s>"}
TEXTS = [
    "a", " ", "  ", "\n", "\t", "\r\n", "\u2028", "\u00a0", "\0", "\ufeff", "\u200b", "漢字👩‍👩", "a\nb\r\nc",
    "SPECIAL", "SPECIALthe", "SPECIAL the", "the SPECIAL", "SPECIALSPECIAL", " SPECIAL\n", "the " * 300,
]
NO_TEXTS = [None, 5, b"the", ["the"], float("nan")]
SURROGATES = ["\ud800", "the \udfff", "\udc80\ud83d"]


@pytest.fixture(scope="module")
def opened(binarised: Any) -> Any:
    made = {}
    for model in SPECIAL:
        where = str(GOLDEN_HF / model), str(binarised(GOLDEN_HF / model))
        store = {"dstore_dir": str(GOLDEN_HF / model / "dstore"), "knn_sim_func": "do_not_recomp_l2"}
        made[model] = RetrievalLM.open(*where, **store, load_keys=False, k=16, cpu=True)
    return made


@pytest.mark.parametrize("model", SPECIAL)
@pytest.mark.parametrize("text", TEXTS)
def test_every_token_is_scored(opened: Any, model: str, text: str) -> None:
    """All tokens that the tokenizer makes, with the network's own probabilities after the token that begins texts."""
    lm, text = opened[model], text.replace("SPECIAL", SPECIAL[model])
    ids = lm.texts.tokenizer(text, add_special_tokens=False)["input_ids"]
    scored = lm.score_text(text)
    assert len(scored.tokens) == len(scored.log_probs) == len(ids) > 0
    assert np.isfinite(scored.log_probs).all() and scored.perplexity >= 1
    longest = lm._lm.longest
    if len(ids) >= longest:
        too_long = f"^text: found {len(ids)} tokens, expected at most the model's {longest - 1}"
        with pytest.raises(UserError, match=too_long):
            lm.neighbours(text)
        return
    with torch.no_grad():
        logits = lm.scoring.models[0].decoder.network(input_ids=torch.tensor([[lm.texts.start, *ids]])).logits[0]
    expected = logits.double().log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    np.testing.assert_allclose(scored.lm_log_probs, expected.numpy(), atol=1e-4)
    assert len(lm.neighbours(text, k=3)) == 3
    assert isinstance(lm.continue_text(text, max_len_b=2), str)


@pytest.mark.parametrize("model", SPECIAL)
@pytest.mark.parametrize("call", ["score_text", "neighbours", "continue_text"])
def test_what_is_no_text_is_one_sentence(opened: Any, model: str, call: str) -> None:
    do = getattr(opened[model], call)
    for text in NO_TEXTS:
        with pytest.raises(UserError, match="^text: found .*, expected a str"):
            do(text)
    for text in SURROGATES:
        with pytest.raises(UserError, match="^text: found the lone surrogate .*, expected Unicode characters"):
            do(text)


def test_the_empty_text(opened: Any) -> None:
    """Nothing to score, but something to begin with: what follows the token before every text."""
    for lm in opened.values():
        with pytest.raises(UserError, match="^text: found '', expected at least one token"):
            lm.score_text("")
        assert len(lm.neighbours("", k=2)) == 2 and isinstance(lm.continue_text("", max_len_b=2), str)


def test_the_empty_text_without_a_beginning(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tokenizer has neither BOS nor EOS, nothing stands before a text."""
    lm = opened["gpt2"]
    monkeypatch.setattr(lm.texts, "start", -1)
    for call in (lm.neighbours, lm.continue_text):
        with pytest.raises(UserError, match="^text: found no token, .* neither BOS nor EOS"):
            call("")


@pytest.mark.parametrize("k", [0, -1, 1.5, 2.0, True, None, "3", float("nan"), [2]])
def test_numbers_of_neighbours(opened: Any, k: Any) -> None:
    with pytest.raises(UserError, match="^k: found .*, expected an integer of at least 1"):
        opened["gpt2"].neighbours("the", k=k)


def test_larger_numbers_of_neighbours(opened: Any) -> None:
    lm = opened["gpt2"]
    assert len(lm.neighbours("the", k=np.int64(3))) == 3
    assert len(lm.neighbours("the", k=10**30)) == len(lm.neighbours("the", k=lm.knnlm.index.count)) > 100


SETTINGS = {
    "max_len_b": [-1, 1.5, None, "3", True],
    "sampling_topk": [0, -2, 1.5, None, "3"],
    "sampling_topp": [0, 2, None, "3", float("nan")],
    "temperature": [0, -1, None, "3", float("nan"), float("inf"), True],
    "seed": [1.5, "3", True],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_continuations(opened: Any, name: str) -> None:
    for value in SETTINGS[name]:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: found .*, expected "):
            opened["gpt2"].continue_text("the", **{"sampling": True, name: value})
    assert ChoiceSettings(max_len_b=np.int64(3), temperature=np.float32(0.5))  # type: ignore[arg-type]


def test_texts_of_words(golden: Path, tmp_path: Path) -> None:
    """With a checkpoint: a text without a word is refused where it would be scored, and so is what is no text."""
    lm = RetrievalLM.open(str(golden / "checkpoints/checkpoint_best.pt"), str(golden / "data-bin"), cpu=True)
    for text in ("", " ", "\n", "\u2028"):
        with pytest.raises(UserError, match="expected at least one word"):
            lm.score_text(text)
    for call in (lm.score_text, lm.continue_text):
        for text in NO_TEXTS:
            with pytest.raises(UserError, match="^text: found .*, expected a str"):
                call(text)  # type: ignore[operator]
        call("\ud800")  # type: ignore[operator]  # an unknown word
