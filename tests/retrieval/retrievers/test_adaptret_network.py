"""AdaptRet's parts against plain loops, and its training on data whose best weights are known."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.errors import BadFile, UserError
from fairseq.retrieval.retrievers import adaptret_network
from fairseq.retrieval.retrievers.adaptret_network import (
    AdaptRet,
    AdaptRetNetwork,
    AdaptRetRecipe,
    TrainingData,
    loss_of,
    perplexity_at,
    split_groups,
    threshold_at,
    train,
)

SMALL = AdaptRetRecipe(("ctxt", "lm_max", "fert"), hidden=16, layers=2, epochs=3, dropout=0.0, l1=0.01)


def example(tokens: int = 3000, seed: int = 0) -> TrainingData:
    """Retrieval is right where the first number of the query is positive, the LM where it is negative."""
    generator = np.random.default_rng(seed)
    queries = generator.normal(size=(tokens, 6)).astype(np.float32)
    retrieval_knows = queries[:, 0] > 0
    features = {
        "ctxt": queries,
        "lm_max": generator.random((tokens, 1), np.float32),
        "lm_ent": generator.random((tokens, 1), np.float32),
        "freq": generator.random((tokens, 4), np.float32),
        "fert": generator.random((tokens, 4), np.float32),
    }
    right, wrong = np.float32(math.log(0.9)), np.float32(math.log(0.01))
    lm, knn = np.where(retrieval_knows, wrong, right), np.where(retrieval_knows, right, wrong)
    return TrainingData(features, lm, knn, np.arange(tokens) // 100)


def test_loss_against_a_loop() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    lm, knn = torch.tensor([-1.0, -5.0, -2.0]), torch.tensor([-3.0, -0.5, -10000.0])
    total, penalty = 0.0, 0.0
    for (a, b), p, q in zip(weights.tolist(), lm.tolist(), knn.tolist()):
        total -= math.log(a * math.exp(p) + b * math.exp(q)) / 3
        penalty += 0.05 * b / 3
    assert loss_of(weights.log(), lm, knn, 0.05).item() == pytest.approx(total + penalty, rel=1e-5)


@pytest.mark.parametrize("cutoff", [0, 10, 30, 50, 90, 100])
def test_threshold_saves_the_share_asked_for(cutoff: int) -> None:
    weights = -np.random.default_rng(1).random(1000).astype(np.float32)
    threshold = threshold_at(weights, cutoff)
    not_searched = sum(weight >= threshold for weight in weights.tolist())
    assert not_searched == pytest.approx(10 * cutoff, abs=1)


def test_perplexity_against_a_loop() -> None:
    generator = np.random.default_rng(2)
    log_weights = np.log(generator.dirichlet([1, 1], 50)).astype(np.float32)
    lm, knn = -generator.random(50) * 5, -generator.random(50) * 5
    threshold = threshold_at(log_weights[:, 0], 40)
    total = 0.0
    for (a, b), p, q in zip(log_weights.tolist(), lm.tolist(), knn.tolist()):
        total -= math.log(math.exp(a + p) + math.exp(b + q)) if a < threshold else p
    assert perplexity_at(log_weights, lm, knn, threshold) == pytest.approx(math.exp(total / 50), rel=1e-5)


def test_network_is_the_paper_s() -> None:
    network = AdaptRetNetwork(AdaptRetRecipe(), 100)
    linear = [tuple(layer.weight.shape) for layer in network.body if isinstance(layer, torch.nn.Linear)]
    assert linear == [(128, 200)] + [(128, 128)] * 4 + [(2, 128)]  # 100 of the query, 4 features of 25 each
    small = [tuple(layer.weight.shape) for layer in network.inputs["fert"] if isinstance(layer, torch.nn.Linear)]
    assert small == [(25, 4), (25, 25)]
    assert sum(isinstance(layer, torch.nn.Dropout) and layer.p == 0.2 for layer in network.body) == 5
    features = {name: torch.randn(7, width or 100) for name, width in adaptret_network.WIDTHS.items()}
    torch.testing.assert_close(network(features).exp().sum(1), torch.ones(7))


def test_groups_are_held_out_whole() -> None:
    groups = np.repeat(np.arange(20), 7)
    training, held_out = split_groups(groups, 0.1, 5)
    assert sorted([*training, *held_out]) == list(range(140))
    assert len(set(groups[held_out])) == 2 and not set(groups[held_out]) & set(groups[training])
    assert len(split_groups(groups, 0.0, 5)[1]) == 7
    with pytest.raises(UserError, match="expected at least 2"):
        split_groups(np.zeros(9, np.int64), 0.1, 5)


def test_training_finds_where_retrieval_helps(tmp_path: Path) -> None:
    path = str(tmp_path / "gate.pt")
    model = train(example(), SMALL, path, {"note": "x"}, progress=False)
    fresh = example(500, seed=9)
    log_weights = model.weights({name: torch.from_numpy(values) for name, values in fresh.features.items()})
    helps = fresh.features["ctxt"][:, 0] > 0
    searched = (log_weights[:, 0] < model.threshold(0.5)).numpy()
    assert (searched == helps).mean() > 0.9
    assert 0.4 < 1 - searched.mean() < 0.6
    curve = model.info["held_out_perplexity"]
    assert curve[50] < 2 < 10 < model.info["lm_perplexity"]
    assert model.threshold(0) == math.inf and model.threshold(1) == -math.inf
    assert model.thresholds[55] < model.threshold(0.52) < model.thresholds[50]
    assert not (tmp_path / "gate.pt.last").exists()


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = AdaptRetRecipe(("ctxt", "freq"), hidden=8, layers=1, epochs=3, dropout=0.3)
    whole = train(example(600), recipe, str(tmp_path / "a"), {}, progress=False)
    validate = adaptret_network._Training._validate

    def killed(self: adaptret_network._Training, loss: float) -> None:
        validate(self, loss)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adaptret_network._Training, "_validate", killed)
        train(example(600), recipe, str(tmp_path / "b"), {}, progress=False)
    epochs = []

    def watched(self: adaptret_network._Training, loss: float) -> None:
        epochs.append(self.epoch)
        validate(self, loss)

    monkeypatch.setattr(adaptret_network._Training, "_validate", watched)
    again = train(example(600), recipe, str(tmp_path / "b"), {}, progress=False)
    assert epochs == [3]
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert whole.thresholds == again.thresholds


def test_other_data_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recipe = AdaptRetRecipe(("ctxt",), hidden=4, layers=1, epochs=1)
    training = adaptret_network._Training(example(400), recipe, str(tmp_path / "c"), {})
    training.epoch = 1
    training._validate(0.0)
    adaptret_network._Training(example(400, seed=3), recipe, str(tmp_path / "c"), {})._resume()
    assert "continuing" not in caplog.text
    adaptret_network._Training(example(400), recipe, str(tmp_path / "c"), {})._resume()
    assert "continuing after epoch 1" in caplog.text


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "lm.pt")
    with pytest.raises(BadFile, match="fairseq-adaptret"):
        AdaptRet.load(str(tmp_path / "lm.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(BadFile):
        AdaptRet.load(str(tmp_path / "text.pt"))
    torch.save({"adaptret": 1, "model": {}, "recipe": {"features": ["ctxt"]}, "dimension": 3}, tmp_path / "part.pt")
    with pytest.raises(BadFile):
        AdaptRet.load(str(tmp_path / "part.pt"))
