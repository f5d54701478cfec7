"""Tiny random models of many families: keys are what a hook written by hand sees, log-probabilities those of the
model's own forward pass, in one pass for a batch with padding and in slices of the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fairseq.data.token_ids import TokenIds
from fairseq.errors import BadFlag
from fairseq.generation.lm_steps import LMSteps
from fairseq.key_types import KEY_TYPES, Activations, keys_of
from fairseq.models.huggingface.language_model import HuggingFaceDecoder, HuggingFaceLM
from fairseq.modules import adaptive_softmax
from fairseq.sequence_scorer import SequenceScorer
from tests.huggingface.families import FAMILIES, VOCABULARY, make

LENGTHS = (11, 7)


@dataclasses.dataclass
class Args:
    knn_keytype: str | None


def rows() -> torch.Tensor:
    """(2, 12) tokens, the second row shorter."""
    tokens = torch.randint(0, VOCABULARY, (2, LENGTHS[0] + 1), generator=torch.Generator().manual_seed(5))
    tokens[1, LENGTHS[1] + 1 :] = -1
    return tokens


def scored(network: Any, key_type: str | None, module: str | None = None) -> list[list[dict[str, Any]]]:
    vocabulary, tokens = TokenIds(VOCABULARY, "", 0, ""), rows()
    model = HuggingFaceLM(HuggingFaceDecoder(network, vocabulary, key_type, module))
    scorer = SequenceScorer(vocabulary, args=Args(key_type))  # type: ignore[arg-type]
    sample = {"net_input": {"src_tokens": tokens[:, :-1], "src_lengths": None}, "target": tokens[:, 1:]}
    sample["start_indices"] = [0, 0]
    return scorer.generate([model], sample)


def hooked(network: Any, name: str | None, row: int) -> dict[str, torch.Tensor]:
    """What hooks by hand see while one row goes through the model alone, and its log-probabilities."""
    seen: dict[str, torch.Tensor] = {}
    tokens = rows()[row, : LENGTHS[row] + 1]
    handles = []
    if name is not None:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, args: seen.update(last_ffn_input=args[0])))
        head = network.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda m, args: seen.update(final_hidden=args[0])))
    logits = network(tokens[None, :-1]).logits[0].float()
    for handle in handles:
        handle.remove()
    seen = {key: value.reshape(LENGTHS[row], -1) for key, value in seen.items()}
    seen["log_probs"] = logits.log_softmax(1).gather(1, tokens[1:, None]).squeeze(1)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, (_, name) = make(family), FAMILIES[family]
    monkeypatch.setattr(adaptive_softmax, "CHUNK_ELEMENTS", 4 * VOCABULARY)  # slices of four tokens
    key_types = ["final_hidden"] if name is None else ["last_ffn_input", "final_hidden"]
    for key_type in key_types:
        for row, ((hypothesis,), length) in enumerate(zip(scored(network, key_type), LENGTHS)):
            by_hand = hooked(network, name, row)
            assert len(hypothesis["tokens"]) == length
            torch.testing.assert_close(hypothesis["positional_scores"], by_hand["log_probs"], atol=2e-4, rtol=1e-4)
            if key_type in by_hand:
                torch.testing.assert_close(hypothesis["queries"], by_hand[key_type], atol=1e-4, rtol=1e-4)
    if name is None:
        with pytest.raises(BadFlag, match="expected one of final_hidden, last_ffn_output"):
            scored(network, "last_ffn_input")


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mamba"])
def test_outputs_of_layers(family: str) -> None:
    """`last_ffn_output` is the last layer's output, of which the final norm makes what the head reads."""
    network = make(family)
    decoder = HuggingFaceDecoder(network, TokenIds(VOCABULARY, "", 0, ""), "last_ffn_output")
    tokens = rows()[:, :-1]
    _, extra = decoder(tokens, features_only=True)
    keys = keys_of("last_ffn_output", extra, *tokens.shape)
    seen = []
    decoder.layers[-1].register_forward_hook(lambda m, args, output: seen.append(output))
    network.base_model(tokens.clamp(min=0))
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(keys, output.transpose(0, 1))
    assert set(KEY_TYPES) >= {"last_ffn_input", "last_ffn_output", "final_hidden"}
    assert Activations(extra, 3).layer_output(-1).shape[0] == 3


def test_a_module_is_named() -> None:
    network = make("llama")
    hypotheses = scored(network, "last_ffn_input", "model.layers.0.mlp")
    seen = []
    network.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    network(rows()[:1, :-1])
    torch.testing.assert_close(hypotheses[0][0]["queries"], seen[0][0], atol=1e-4, rtol=1e-4)
    with pytest.raises(BadFlag, match="--knn-module: found model.layers.9.mlp, expected .* model.layers.1.mlp"):
        scored(network, "last_ffn_input", "model.layers.9.mlp")


def test_no_logits_as_wide_as_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees a few tokens at a time; without targets, as when a datastore is saved, it sees none."""
    monkeypatch.setattr(adaptive_softmax, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    network, shapes = make("llama"), []
    vocabulary, tokens = TokenIds(VOCABULARY, "", 0, ""), rows()
    model = HuggingFaceLM(HuggingFaceDecoder(network, vocabulary, "last_ffn_input"))
    network.lm_head.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[-2]))
    sample = {"net_input": {"src_tokens": tokens[:, :-1], "src_lengths": None}, "target": tokens[:, 1:]}
    scorer = SequenceScorer(vocabulary, args=Args("last_ffn_input"))  # type: ignore[arg-type]
    scorer.generate([model], sample)
    assert max(shapes) == 4 and sum(shapes) == sum(LENGTHS)
    shapes.clear()
    scorer.keys([model], sample)
    assert shapes == []


def alone(network: Any, tokens: list[int]) -> torch.Tensor:
    """(V,) log-probabilities after some tokens, from one pass without a cache."""
    return network(torch.tensor([[0, *tokens]])).logits[0, -1].float().log_softmax(0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_positions_one_by_one(family: str) -> None:
    """Prompts of unequal length, read together; then rows are exchanged and copied, and positions taken back."""
    network = make(family)
    model = HuggingFaceLM(HuggingFaceDecoder(network, TokenIds(VOCABULARY, "", 0, "")))
    steps = LMSteps([model], -1, 0)
    texts = [[5, 9, 3, 7, 8], [4, 6]]

    def check(log_probs: torch.Tensor) -> None:
        expected = torch.stack([alone(network, text) for text in texts])
        torch.testing.assert_close(log_probs[:, -1], expected, atol=2e-4, rtol=0)

    check(steps.begin([torch.tensor(text) for text in texts]).log_probs)
    texts = [[*text, token] for text, token in zip(texts, (11, 12))]
    check(steps.extend(torch.tensor([[11], [12]])).log_probs)
    steps.take_rows(torch.tensor([1, 0, 1]))
    texts = [texts[1], texts[0], texts[1]]
    several = steps.extend(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    check_at = torch.stack([alone(network, [*text, token]) for text, token in zip(texts, (1, 3, 5))])
    torch.testing.assert_close(several.log_probs[:, 0], check_at, atol=2e-4, rtol=0)
    steps.crop(1)
    texts = [[*text, first, 9] for text, first in zip(texts, (1, 3, 5))]
    check(steps.extend(torch.tensor([[9], [9], [9]])).log_probs)
