"""`generate` with retrieval attached: each hypothesis has its own state. What is generated has, read again, the same
probabilities; beams are those of a plain search that keeps a state for each hypothesis; kNN-LM continues as
knn-transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.attached_retrieval import Retrieval
from fairseq.errors import UserError
from tests.huggingface.attached import GENERATED, ByHand, opened, random_datastore
from tests.huggingface.conftest import GOLDEN_HF
from tests.huggingface.families import FAMILIES, VOCABULARY, make

GOLDEN = json.loads((GOLDEN_HF / "generation.json").read_text())
STRATEGIES: dict[str, dict[str, Any]] = {
    "knnlm": {"no_pointer": True},
    "retomaton": {"min_knns": 1},
    "searching often": {"min_knns": 3, "max_knns": 40},
    "chains": {"strategy": "retomaton_chains"},
}
NEW = 7


def prompts(count: int, length: int = 6) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(9))


def generated(model: Any, tokens: torch.Tensor, new: int = NEW, **settings: Any) -> Any:
    return model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **{**GENERATED, **settings})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_datastore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def llama() -> Any:
    return make("llama")


@pytest.mark.parametrize("name, beams", [("knnlm_greedy", 1), ("knnlm_beam4", 4)])
def test_the_continuations_of_knn_transformers(name: str, beams: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(GOLDEN_HF / "gpt2").eval()
    how = {"knn_sim_func": "do_not_recomp_l2", "no_load_keys": True, "no_pointer": True, "tie_order": "stable"}
    retrieval = Retrieval.open(dstore_dir=str(GOLDEN_HF / "gpt2/dstore"), k=128, lmbda=0.25, **how)
    with retrieval.attached_to(model):
        for one in GOLDEN[name]:
            prompt = torch.tensor([one["prompt_ids"]])
            output = generated(model, prompt, 40, num_beams=beams)
            assert output.sequences[0, prompt.shape[1] :].tolist() == one["new_ids"]
            if beams > 1:
                assert float(output.sequences_scores[0]) == pytest.approx(one["sequence_score"], abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_generated_is_what_is_read(store: Path, llama: Any, strategy: str) -> None:
    """Greedily and by sampling, several sequences for each prompt; with and without the model's cache."""
    with opened(store, **STRATEGIES[strategy]).attached_to(llama):
        for how in ({}, {"do_sample": True, "num_return_sequences": 3, "top_k": 0}, {"use_cache": False}):
            torch.manual_seed(0)
            output = generated(llama, prompts(2), output_logits=True, **how)
            read = llama(output.sequences).logits[:, -NEW - 1 : -1]
            torch.testing.assert_close(torch.stack(output.logits, 1), read, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_beams_are_those_of_a_search_with_a_state_for_each(store: Path, llama: Any, strategy: str) -> None:
    retrieval, beams = opened(store, **STRATEGIES[strategy]), 4
    hand = ByHand(llama, retrieval)
    for prompt in prompts(1).tolist():
        hypotheses = [(0.0, prompt)]
        for _ in range(NEW):
            longer = []
            for score, tokens in hypotheses:
                log_probs = hand(tokens)[-1]
                log_probs[0] = -torch.inf  # EOS, which is kept away
                best = log_probs.topk(beams)
                chosen = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                longer += [(score + more, [*tokens, token]) for more, token in chosen]
            hypotheses = sorted(longer, reverse=True)[:beams]
        with retrieval.attached_to(llama):
            output = generated(llama, torch.tensor([prompt]), num_beams=beams, num_return_sequences=beams)
        assert output.sequences.tolist() == [tokens for _, tokens in hypotheses]
        scores = [score / NEW for score, _ in hypotheses]
        assert output.sequences_scores.tolist() == pytest.approx(scores, abs=1e-4)


def test_beams_do_change_places(store: Path, llama: Any) -> None:
    """Else the test above would show nothing."""
    with opened(store).attached_to(llama):
        output = generated(llama, prompts(2), num_beams=4, num_return_sequences=4)
    places = output.beam_indices.reshape(2, 4, -1) - torch.arange(2)[:, None, None] * 4
    assert len(set(places.flatten().tolist())) > 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_unequal_length(store: Path, llama: Any, strategy: str, beams: int) -> None:
    """With padding at the left, each prompt goes on as it does alone."""
    lengths, width = (2, 7, 5, 7), 7
    texts = [prompts(1, length)[0] for length in lengths]
    padded, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
    with opened(store, **STRATEGIES[strategy]).attached_to(llama):
        together = generated(llama, padded, attention_mask=mask, num_beams=beams)
        for row, text in enumerate(texts):
            alone = generated(llama, text[None], num_beams=beams)
            assert together.sequences[row, width:].tolist() == alone.sequences[0, len(text) :].tolist()


def test_lambda_zero_writes_what_the_model_writes(store: Path, llama: Any) -> None:
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}):
        found = []
        for lmbda in (None, 0.0):
            torch.manual_seed(3)
            if lmbda is None:
                found.append(generated(llama, prompts(3), **how).sequences)
                continue
            with opened(store, lmbda=lmbda).attached_to(llama):
                found.append(generated(llama, prompts(3), **how).sequences)
        assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(store: Path, family: str) -> None:
    """Caches and inputs of all kinds: with beams, which are reordered, what is written is what is read."""
    model = make(family)
    key_type = "last_ffn_input" if FAMILIES[family][1] else "final_hidden"
    with opened(store, knn_keytype=key_type, min_knns=2).attached_to(model):
        output = generated(model, prompts(2), num_beams=3, num_return_sequences=3)
        read = model(output.sequences).logits[:, -NEW - 1 : -1]
    tokens = output.sequences[:, -NEW:]
    total = read.gather(2, tokens[:, :, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores * NEW, total, atol=2e-3, rtol=0)


def test_a_cache_goes_on_from_call_to_call(store: Path, llama: Any) -> None:
    with opened(store).attached_to(llama):
        first = generated(llama, prompts(2), use_cache=True)
        whole = torch.cat([first.sequences, prompts(2, 3)], 1)
        again = generated(llama, whole, cache=first.cache)
        afresh = generated(llama, whole)
        assert torch.equal(again.sequences, afresh.sequences)


def test_prompts_are_read_in_parts(store: Path, llama: Any) -> None:
    with opened(store).attached_to(llama):
        parts = generated(llama, prompts(2, 9), prefill_chunk_size=4)
        assert torch.equal(parts.sequences, generated(llama, prompts(2, 9)).sequences)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_loop_of_ones_own(store: Path, family: str) -> None:
    """Token by token with a cache; `take_rows` tells of rows that were reordered."""
    tokens, model = prompts(3, 12), make(family)
    with opened(store, min_knns=2, knn_keytype="final_hidden").attached_to(model) as attachment:
        whole = model(tokens).logits
        output = model(tokens[:, :5])
        pieces = [output.logits]
        for place in range(5, 12):
            output = model(tokens[:, place : place + 1], cache=output.cache)
            pieces.append(output.logits)
            if place == 8:
                order = torch.tensor([2, 0, 0])
                output.cache.reorder_cache(order)
                attachment.take_rows(order)
                tokens, whole, pieces = tokens[order], whole[order], [piece[order] for piece in pieces]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-4, rtol=1e-4)


def with_old_cache(model: Any, retrieval: Retrieval) -> None:
    cache = model(prompts(1)).cache
    with retrieval.attached_to(model):
        model(prompts(1)[:, :1], cache=cache)


def with_padding_later(model: Any, retrieval: Retrieval) -> None:
    with retrieval.attached_to(model):
        cache = model(prompts(1)).cache
        mask = torch.ones(1, 7, dtype=torch.long)
        mask[0, 6] = 0
        model(prompts(1)[:, :1], cache=cache, attention_mask=mask)


def with_other_padding(model: Any, retrieval: Retrieval) -> None:
    with retrieval.attached_to(model):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, 0] = 0
        cache = model(prompts(2), attention_mask=mask).cache
        mask = torch.cat([mask.flip(0), torch.ones(2, 1, dtype=torch.long)], 1)
        model(prompts(2)[:, :1], cache=cache, attention_mask=mask)


def with_drafts(model: Any, retrieval: Retrieval) -> None:
    with retrieval.attached_to(model):
        model.generate(prompts(1).repeat(1, 4), max_new_tokens=20, prompt_lookup_num_tokens=3, do_sample=False)


def with_embeddings(model: Any, retrieval: Retrieval) -> None:
    with retrieval.attached_to(model):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)


MISTAKES = {
    with_old_cache: "begin with an empty cache",
    with_padding_later: "padding after the beginning",
    with_other_padding: "take_rows",
    with_drafts: "without drafts",
    with_embeddings: "input_ids",
}


@pytest.mark.parametrize("do", MISTAKES, ids=lambda do: do.__name__)
def test_mistakes_are_one_sentence(store: Path, llama: Any, do: Any) -> None:
    with pytest.raises(UserError) as raised:
        do(llama, opened(store))
    assert MISTAKES[do] in str(raised.value) and "\n" not in str(raised.value)
    assert not llama._forward_hooks and "prepare_inputs_for_generation" not in vars(llama)


def test_drafts_count_as_long_as_they_are_accepted(store: Path) -> None:
    """What is written with them is what is written without; the first token that is rejected ends it."""
    from transformers import AutoModelForCausalLM

    model, assistant = (AutoModelForCausalLM.from_pretrained(GOLDEN_HF / "gpt2").eval() for _ in range(2))
    tokens, settings = prompts(1), {"max_new_tokens": 12, "do_sample": False}
    with opened(store).attached_to(model):
        expected = model.generate(tokens, **settings)
    with opened(store, lmbda=0.01).attached_to(model):
        alone = model.generate(tokens, **settings)
    with opened(store, lmbda=0.01).attached_to(model):  # the mixture chooses what the model does
        assert torch.equal(model.generate(tokens, assistant_model=assistant, **settings), alone)
    with opened(store).attached_to(model), pytest.raises(UserError, match="without drafts"):
        torch.manual_seed(0)
        other = AutoModelForCausalLM.from_config(model.config).eval()
        model.generate(tokens, assistant_model=other, **settings)
    with opened(store).attached_to(model):
        assert torch.equal(model.generate(tokens, **settings), expected)  # nothing of it is left
