"""Retrieval attached to a model object: losses and log-probabilities are those of eval_lm.py, rows of a batch do not
see each other, padding is no text, and the model is afterwards as it was before."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.attached_retrieval import Retrieval
from fairseq.errors import UserError
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.knnlm import build_knnlm
from fairseq.retrieval_lm import RetrievalLM
from tests.huggingface.attached import ByHand, opened, random_datastore
from tests.huggingface.conftest import GOLDEN_HF
from tests.huggingface.families import VOCABULARY, make

WINDOW, ROWS = 48, 6
FILES = {"no_load_keys": True, "knn_sim_func": "do_not_recomp_l2", "k": 64, "lmbda": 0.3}
MEMBERS = {
    "gpt2": "gpt2/clusters/members_gpt2_17662_32_20000000_200.pkl",
    "llama": "llama/clusters/members_llama_18814_32_20000000_200.pkl",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "knnlm": {"no_pointer": True},
    "random_skip": {"strategy": "random_skip", "skip_probability": 0.3},
    "retomaton": {"min_knns": 1},
    "always searching": {"min_knns": 9999999},
    "searching often, few pointers": {"min_knns": 8, "max_knns": 16},
    "clusters": {"members": True},
    "clusters, searching often": {"members": True, "min_knns": 20},
    "chains": {"strategy": "retomaton_chains", "members": True},
    "hot": {"knn_temp": 10.0, "members": True, "tie_order": "stable"},
    "all of it": {"lmbda": 1.0, "no_pointer": True, "knn_temp": 50.0},
}


def loaded(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(GOLDEN_HF / model).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: loaded(name) for name in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """model -> the settings that name the files of its datastore."""
    return {name: {"dstore_dir": str(GOLDEN_HF / name / "dstore")} for name in MEMBERS}


def with_files(files: dict[str, Any], model: str, **settings: Any) -> dict[str, Any]:
    if settings.get("members") is True:
        settings["members"] = str(GOLDEN_HF / MEMBERS[model])
    return {**FILES, **files[model], **settings}


@pytest.fixture(scope="module")
def scored(binarised: Any) -> Any:
    """scored(model): the first windows of the valid text as eval_lm.py scores them: sequences, width, vocabulary."""
    made: dict[str, Any] = {}

    def score(model: str) -> Any:
        if model not in made:
            flags = f"--gen-subset valid --max-length {WINDOW} --drop-remainder --max-sentences {ROWS} --cpu --knnlm"
            words = [str(binarised(GOLDEN_HF / model)), "--path", str(GOLDEN_HF / model), *flags.split()]
            scoring = LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), words))
            made[model] = scoring, scoring.score(next(scoring.batches()))
        return made[model]

    return score


def windows(sequences: list[Any]) -> torch.Tensor:
    """(B, T): the tokens of windows, the first of which is not scored."""
    return torch.stack([torch.cat([torch.tensor([one.preceding]), one.targets]) for one in sequences])


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_the_command(models: Any, files: Any, scored: Any, model: str, name: str) -> None:
    settings = with_files(files, model, **SETTINGS[name])
    scoring, sequences = scored(model)
    parsed = options.parse_args_and_arch(
        options.get_eval_lm_parser(), [".", "--knnlm", *options.as_words(settings)]
    )
    expected = build_knnlm(parsed, scoring.key_dimension).score(sequences)
    tokens = windows(sequences)
    with Retrieval.open(**settings).attached_to(models[model]):
        mixed = models[model](tokens[:, :-1]).logits
        loss = models[model](tokens, labels=tokens).loss
    log_probs = mixed.gather(2, tokens[:, 1:, None]).squeeze(2)
    theirs = torch.stack([result.log_probs for result in expected])
    found = theirs > -1000  # where the weight of retrieval is 1, what it does not find is impossible
    torch.testing.assert_close(log_probs[found], theirs[found], atol=1e-5, rtol=0)
    assert bool((log_probs[~found] < -1000).all()) and bool(found.all()) == (name != "all of it")
    if bool(found.all()):
        assert float(loss) == pytest.approx(-float(theirs.double().mean()), abs=1e-4)
        assert float(mixed.exp().sum(2).max()) < 1 + 1e-4


def test_rows_of_unequal_length_are_what_they_are_alone(models: Any, files: Any) -> None:
    model, random = models["llama"], torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 1000, (length,), generator=random) for length in (9, 30, 1, 17, 30)]
    for settings in (SETTINGS["retomaton"], SETTINGS["chains"], SETTINGS["knnlm"]):
        retrieval = Retrieval.open(**with_files(files, "llama", **settings))
        with retrieval.attached_to(model):
            alone = [model(text[None]).logits[0] for text in texts]
            for side in ("left", "right"):
                padded = torch.full((len(texts), 30), 7)
                mask = torch.zeros_like(padded)
                for row, text in enumerate(texts):
                    part = slice(30 - len(text), 30) if side == "left" else slice(0, len(text))
                    padded[row, part], mask[row, part] = text, 1
                together = model(padded, attention_mask=mask).logits
                for row, one in enumerate(alone):
                    torch.testing.assert_close(together[row, mask[row] == 1], one, atol=2e-4, rtol=0)


def test_padding_has_the_models_own_probabilities(models: Any, files: Any) -> None:
    model, tokens = models["llama"], torch.arange(20).reshape(2, 10) + 5
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[1] = 0, 0
    with torch.no_grad():
        own = model(tokens, attention_mask=mask).logits.log_softmax(-1)
    with Retrieval.open(**with_files(files, "llama", members=True)).attached_to(model):
        mixed = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(mixed[mask == 0], own[mask == 0], atol=0, rtol=0)
    assert float((mixed - own)[mask == 1].abs().max()) > 0.1


@pytest.mark.parametrize("family", ["opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("strategy", ["retomaton", "retomaton_chains"])
def test_families_against_a_loop_by_hand(tmp_path: Path, family: str, strategy: str) -> None:
    retrieval = opened(random_datastore(tmp_path), strategy=strategy, min_knns=2)
    model, tokens = make(family), torch.randint(0, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(3))
    expected = [ByHand(model, retrieval)(row.tolist()) for row in tokens]
    with retrieval.attached_to(model):
        mixed = model(input_ids=tokens).logits
    torch.testing.assert_close(mixed.double(), torch.stack(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("key_type", ["last_ffn_output", "final_hidden"])
def test_other_types_of_keys(tmp_path: Path, key_type: str) -> None:
    model, tokens = make("mamba" if key_type == "final_hidden" else "llama"), torch.arange(12)[None] + 3
    retrieval = opened(random_datastore(tmp_path), knn_keytype=key_type)
    with retrieval.attached_to(model):
        mixed = model(input_ids=tokens).logits
    torch.testing.assert_close(mixed[0].double(), ByHand(model, retrieval)(tokens[0].tolist()), atol=2e-4, rtol=0)


def test_lambda_zero_is_the_model(models: Any, files: Any) -> None:
    model, tokens = models["gpt2"], torch.arange(40).reshape(2, 20) + 50
    own = model(tokens, labels=tokens)
    with Retrieval.open(**with_files(files, "gpt2", members=True, lmbda=0.0)).attached_to(model):
        mixed = model(tokens, labels=tokens)
    assert torch.equal(mixed.logits, own.logits.log_softmax(-1))
    assert float(mixed.loss) == pytest.approx(own.loss.item(), abs=1e-6)


# -- the model afterwards


def state_of(model: Any) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return hooks, {name: value.clone() for name, value in model.state_dict().items()}


def test_the_model_is_as_before(models: Any, files: Any) -> None:
    model, tokens = models["gpt2"], torch.arange(12)[None] + 90
    retrieval = Retrieval.open(**with_files(files, "gpt2", members=True))
    hooks, weights = state_of(model)
    before = model(tokens).logits
    with pytest.raises(ZeroDivisionError), retrieval.attached_to(model):
        model(tokens)
        raise ZeroDivisionError
    with pytest.raises(UserError), retrieval.attached_to(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with retrieval.attached_to(model) as attachment:
        assert not torch.equal(model(tokens).logits, before)
        attachment.detach()
        assert torch.equal(model(tokens).logits, before)
    now, after = state_of(model)
    assert now == hooks and all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(model(tokens).logits, before)


def test_what_is_returned_has_the_models_form(models: Any, files: Any) -> None:
    model, tokens = models["llama"], torch.arange(10).reshape(2, 5) + 40
    with Retrieval.open(**with_files(files, "llama")).attached_to(model):
        whole = model(tokens, labels=tokens)
        parts = model(tokens, labels=tokens, return_dict=False)
        assert torch.equal(parts[0], whole.loss) and torch.equal(parts[1], whole.logits)
        assert list(whole)[:2] == ["loss", "logits"] and type(whole).__name__ == "CausalLMOutputWithPast"
        by_place = model(tokens, torch.ones_like(tokens))
        assert torch.equal(by_place.logits, whole.logits)
        for keep in (2, torch.tensor([1, 3])):
            kept = model(tokens, logits_to_keep=keep).logits
            expected = whole.logits[:, -2:] if isinstance(keep, int) else whole.logits[:, keep]
            torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
        partly = model(tokens, labels=tokens.masked_fill(tokens < 44, -100))
        expected = -whole.logits[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)[tokens[:, 1:] >= 44].mean()
        assert float(partly.loss) == pytest.approx(float(expected), abs=1e-5)


# -- mistakes


def other_width(prefix: Path) -> None:
    np.zeros((3000, 16), np.float32).tofile(f"{prefix}_keys.npy")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no datastore": ({"dstore_filename": None}, "--dstore-filename: found nothing"),
    "no index": ({"index": None}, "--indexfile: found nothing"),
    "no such file": ({"dstore_filename": "nowhere/d"}, "no such file"),
    "a lambda too large": ({"lmbda": 2}, "--lmbda"),
    "no such strategy": ({"strategy": "none"}, "--strategy"),
    "no such setting": ({"kk": 3}, "--kk"),
    "a setting of something else": ({"context_window": 3}, "a setting of retrieval"),
    "no such module": ({"knn_module": "h.9"}, "--knn-module: found h.9"),
    "no such type of key": ({"knn_keytype": "first"}, "--knn-keytype"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path: Path, models: Any, case: str) -> None:
    settings, said = dict(MISTAKES[case][0]), MISTAKES[case][1]
    prefix = settings.pop("dstore_filename", random_datastore(tmp_path))
    with pytest.raises(UserError) as raised:
        opened(prefix, **settings).attached_to(models["gpt2"])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_models_that_do_not_fit(tmp_path: Path, models: Any) -> None:
    retrieval = opened(random_datastore(tmp_path))
    for model, said in ((torch.nn.Linear(2, 2), "causal language model"), (make("gpt2").train(), "call eval()")):
        with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
            retrieval.attached_to(model)
    with retrieval.attached_to(models["gpt2"]), pytest.raises(UserError, match="attached already"):
        retrieval.attached_to(models["gpt2"])
    narrow = opened(random_datastore(tmp_path, 16), dstore_size=3000)
    with pytest.raises(UserError, match="16|32"):
        narrow.attached_to(models["gpt2"])
    assert not any(module._forward_hooks for module in models["gpt2"].modules())


def test_a_datastore_of_another_model_is_refused(
    binarised: Any, run_cli: Any, tmp_path: Path, models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sidecar tells the model's weights and the type of key, as for the commands."""
    flags = "--gen-subset valid --max-length 64 --save-knnlm-dstore --no-progress-bar --cpu".split()
    where = [binarised(GOLDEN_HF / "gpt2"), "--path", GOLDEN_HF / "gpt2", "--dstore-mmap", tmp_path / "d"]
    assert run_cli("eval_lm", [*where, *flags]).status == 0
    settings = {"index": "exact", "k": 16, "lmbda": 0.2}
    retrieval = Retrieval.open(str(tmp_path / "d"), **settings)
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.WARNING), retrieval.attached_to(models["gpt2"]):
        assert "not known" not in caplog.text
    with pytest.raises(UserError, match="weights"):
        retrieval.attached_to(models["llama"])
    for model in ("gpt2", "llama"):
        folder, data = str(GOLDEN_HF / model), str(binarised(GOLDEN_HF / model))
        with contextlib.nullcontext() if model == "gpt2" else pytest.raises(UserError, match="weights"):
            RetrievalLM.open(folder, data, dstore_filename=str(tmp_path / "d"), cpu=True, **settings)
    with pytest.raises(UserError, match="key type"):
        Retrieval.open(str(tmp_path / "d"), knn_keytype="final_hidden", **settings).attached_to(models["gpt2"])
    said = "in float32, expected .* in bfloat16; open the model in float32 .--hf-dtype float32, dtype=torch.float32"
    with pytest.raises(UserError, match=said):
        retrieval.attached_to(loaded("gpt2").to(torch.bfloat16))
    evaluated = ["--gen-subset", "valid", "--knnlm", "--dstore-filename", tmp_path / "d", "--index", "exact", "--cpu"]
    done = run_cli("eval_lm", [*where[:3], *evaluated, "--k", 16, "--hf-dtype", "bfloat16"])
    assert re.search(said, done.error)
    changed = loaded("gpt2")
    with torch.no_grad():
        changed.transformer.wte.weight[0, 0] += 1
    with pytest.raises(UserError, match="weights"):
        retrieval.attached_to(changed)
    Retrieval.open(str(tmp_path / "d"), force=True, **settings).attached_to(changed).detach()
    with pytest.raises(UserError, match="weights"):
        retrieval.attached_to(changed)
    shutil.move(tmp_path / "d.json", tmp_path / "kept.json")
    with caplog.at_level(logging.WARNING), retrieval.attached_to(changed):
        assert "not known" in caplog.text
