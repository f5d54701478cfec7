"""Beam search against trying everything, on a model of a few words."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from typing import Any

import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.errors import UserError
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.sequence_generator import SequenceGenerator


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    dictionary = Dictionary()
    for word in "abc":
        dictionary.add_symbol(word)
    return dictionary


@pytest.fixture(scope="module")
def model(dictionary: Dictionary) -> Any:
    torch.manual_seed(5)
    args = Namespace(
        decoder_embed_dim=8, decoder_ffn_embed_dim=8, decoder_layers=2, decoder_attention_heads=2, tokens_per_sample=16
    )
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerLanguageModel.build_model(args, task)
    model.decoder.embed_out.data.mul_(4)  # distributions that differ
    return model.eval()


def log_prob(model: Any, words: list[int]) -> list[float]:
    """Log-probability of each word, from one pass without states."""
    source = torch.tensor([[2, *words[:-1]]])
    with torch.no_grad():
        table = model.get_normalized_probs(model(source), True, None)[0]
    return [table[i, word].item() for i, word in enumerate(words)]


def everything(model: Any, prefix: list[int], longest: int, min_len: int = 1) -> list[tuple[float, list[int]]]:
    """All continuations that end within `longest` tokens, best mean first."""
    found = []
    for new in range(min_len - 1, longest - len(prefix)):
        for middle in itertools.product([0, 3, 4, 5, 6], repeat=new):
            words = [*prefix, *middle, 2]
            found.append((sum(log_prob(model, words)) / len(words), words))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("prefix", [[], [4], [5, 6]])
def test_a_beam_as_wide_as_everything_finds_the_best(model: Any, dictionary: Dictionary, prefix: list[int]) -> None:
    longest = len(prefix) + 3
    best = everything(model, prefix, longest)
    generator = SequenceGenerator(dictionary, beam_size=200, max_len_b=longest)
    (found,) = generator.generate([model], {}, prefix_tokens=torch.tensor([prefix], dtype=torch.int64))
    assert [hypothesis["tokens"].tolist() for hypothesis in found[:5]] == [words for _, words in best[:5]]
    for hypothesis, (score, words) in zip(found[:5], best):
        assert hypothesis["score"].item() == pytest.approx(score, abs=1e-5)
        assert hypothesis["positional_scores"].tolist() == pytest.approx(log_prob(model, words), abs=1e-5)


def test_a_beam_of_one_is_greedy(model: Any, dictionary: Dictionary) -> None:
    (found,) = SequenceGenerator(dictionary, max_len_b=8).generate([model], {}, torch.tensor([[4]]))
    words = [4]
    while words[-1] != 2 and len(words) < 7:
        table = [log_prob(model, [*words, word])[-1] for word in range(len(dictionary))]
        table[1] = -math.inf
        words.append(max(range(len(table)), key=table.__getitem__))
    assert found[0]["tokens"].tolist()[: len(words)] == words


def test_limits(model: Any, dictionary: Dictionary) -> None:
    prefixes = torch.tensor([[4, 5, 6], [4, 1, 1]])
    generator = SequenceGenerator(dictionary, beam_size=3, max_len_b=6, min_len=2)
    for row, prefix in zip(generator.generate([model, model], {}, prefixes), ([4, 5, 6], [4])):
        assert len(row) == 3
        scores = [hypothesis["score"].item() for hypothesis in row]
        assert scores == sorted(scores, reverse=True)
        for hypothesis in row:
            tokens = hypothesis["tokens"].tolist()
            assert tokens[: len(prefix)] == prefix and tokens[-1] == 2 and tokens.count(2) == 1 and 1 not in tokens
            assert len(prefix) + 2 <= len(tokens) <= 6


def test_the_samples_source_is_continued(model: Any, dictionary: Dictionary) -> None:
    sample = {"net_input": {"src_tokens": torch.tensor([[2, 4, 5]])}}
    generator = SequenceGenerator(dictionary, max_len_b=5)
    (one,), (two,) = generator.generate([model], sample)[0], generator.generate([model], {}, torch.tensor([[4, 5]]))[0]
    assert torch.equal(one["tokens"], two["tokens"])


def test_penalties(model: Any, dictionary: Dictionary) -> None:
    wide: dict[str, Any] = {"beam_size": 50, "max_len_b": 3}
    prefix = torch.zeros(1, 0, dtype=torch.int64)
    (plain,) = SequenceGenerator(dictionary, **wide).generate([model], {}, prefix)
    (no_unk,) = SequenceGenerator(dictionary, unk_penalty=1e9, **wide).generate([model], {}, prefix)
    assert any(3 in row["tokens"].tolist() for row in plain)
    assert not any(3 in row["tokens"].tolist() for row in no_unk if row["score"] > -1e6)
    (sums,) = SequenceGenerator(dictionary, normalize_scores=False, **wide).generate([model], {}, prefix)
    for row in sums:
        assert row["score"].item() == pytest.approx(row["positional_scores"].sum().item(), abs=1e-4)
    (hot,) = SequenceGenerator(dictionary, temperature=100.0, **wide).generate([model], {}, prefix)
    assert hot[0]["positional_scores"][0].item() == pytest.approx(-math.log(len(dictionary)), abs=0.3)
    with pytest.raises(UserError, match="beam_size 0"):
        SequenceGenerator(dictionary, beam_size=0)


def test_with_an_adaptive_softmax(golden: Any) -> None:
    path = str(golden / "checkpoints" / "checkpoint_best.pt")
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], {"data": str(golden / "data-bin")})
    prefix = task.source_dictionary.encode_line("The old", add_if_not_exist=False, append_eos=False).long()[None]
    rows = SequenceGenerator(task.target_dictionary, beam_size=4, max_len_b=20).generate([model], {}, prefix)[0]
    best = rows[0]
    assert best["positional_scores"].tolist() == pytest.approx(log_prob(model, best["tokens"].tolist()), abs=1e-4)
