"""Losses against sums written out by hand, the tail quirk of the adaptive loss, and what is logged."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fairseq import criterions, metrics
from fairseq.errors import UserError
from fairseq.modules import AdaptiveSoftmax

PAD = 1
TARGET = torch.tensor([[3, 0, 6], [5, PAD, 4]])


def build(name: str, **flags):
    args = argparse.Namespace(criterion=name, sentence_avg=False, ddp_backend="no_c10d", **flags)
    task = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))
    return criterions.build_criterion(args, task)


class Model(torch.nn.Module):
    """Features or logits that are parameters, so that gradients show which targets count."""

    def __init__(self, adaptive: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = torch.nn.Parameter(torch.randn(2, 3, 8 if adaptive else 7))
        softmax = AdaptiveSoftmax(7, 8, [2, 4], 0.0, factor=2.0) if adaptive else None
        self.decoder = SimpleNamespace(adaptive_softmax=softmax)

    def forward(self, **net_input):
        return self.out, {}

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return F.log_softmax(net_output[0].float(), dim=-1)


SAMPLE = {"net_input": {}, "target": TARGET, "ntokens": 5}


def test_cross_entropy_ignores_padding() -> None:
    model = Model(adaptive=False)
    loss, size, output = build("cross_entropy")(model, SAMPLE)
    log_probs = F.log_softmax(model.out, dim=-1)
    by_hand = -sum(log_probs[i, j, TARGET[i, j]] for i in range(2) for j in range(3) if TARGET[i, j] != PAD)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert size == 5 and output["ntokens"] == 5 and output["nsentences"] == 2
    each, _, _ = build("cross_entropy")(model, SAMPLE, reduce=False)
    assert each.shape == (6,) and each[4] == 0 and each.sum().item() == pytest.approx(loss.item(), rel=1e-6)


def test_sentence_average_changes_the_divisor() -> None:
    criterion = build("cross_entropy")
    criterion.args.sentence_avg = True
    assert criterion(Model(False), SAMPLE)[1] == 2


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    model = Model(adaptive=False)
    plain, _, _ = build("cross_entropy")(model, SAMPLE)
    loss, _, output = build("label_smoothed_cross_entropy", label_smoothing=0.1)(model, SAMPLE)
    uniform = -(F.log_softmax(model.out, dim=-1).sum(-1) * TARGET.ne(PAD)).sum()
    assert output["nll_loss"].item() == pytest.approx(plain.item(), rel=1e-6)
    assert loss.item() == pytest.approx((0.9 * plain + 0.1 / 7 * uniform).item(), rel=1e-6)


def test_adaptive_loss_drops_the_tail_of_second_words() -> None:
    """Cutoffs 2, 4 of 7 words: ids 3 and 5 are the second words of their tails, which have padding's number there."""
    model = Model(adaptive=True)
    softmax = model.decoder.adaptive_softmax
    loss, size, output = build("adaptive_loss")(model, SAMPLE)
    features, target = model.out.view(-1, 8), TARGET.view(-1)
    head = F.log_softmax(softmax.head(features), dim=-1)
    full = softmax.get_log_prob(model.out, None).view(-1, 7)
    expected = 0.0
    for row, word in enumerate(target.tolist()):
        if word in (3, 5):
            expected -= head[row, 2 + (word >= 4)].item()
        elif word != PAD:
            expected -= full[row, word].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert size == 5 and output["sample_size"] == 5
    each, _, _ = build("adaptive_loss")(model, SAMPLE, reduce=False)
    assert each.sum().item() == pytest.approx(expected, rel=1e-5) and each[4] == 0
    assert each[2].item() == pytest.approx(-full[2, 6].item(), rel=1e-5)


def test_adaptive_loss_leaves_clusters_without_targets_without_gradient() -> None:
    model = Model(adaptive=True)
    softmax = model.decoder.adaptive_softmax
    loss, _, _ = build("adaptive_loss")(model, {**SAMPLE, "target": torch.tensor([[0, 2, 2]] * 2)})
    loss.backward()
    assert softmax.tail[0][2].weight.grad is not None and softmax.tail[1][2].weight.grad is None


def test_adaptive_loss_sums_in_float32() -> None:
    model = Model(adaptive=True).to(torch.bfloat16)
    model.decoder.adaptive_softmax.to(torch.bfloat16)
    assert build("adaptive_loss")(model, SAMPLE)[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["c10d", "pytorch_ddp"])
def test_adaptive_loss_says_which_backend_it_needs(backend: str) -> None:
    args = argparse.Namespace(criterion="adaptive_loss", sentence_avg=False, ddp_backend=backend)
    args.distributed_world_size = 2
    with pytest.raises(UserError, match="pass --ddp-backend no_c10d"):
        criterions.build_criterion(args, None)
    args.distributed_world_size = 1  # no gradients are exchanged
    task = argparse.Namespace(target_dictionary=argparse.Namespace(pad=lambda: 1))
    assert criterions.build_criterion(args, task) is not None


def test_adaptive_loss_needs_an_adaptive_softmax() -> None:
    with pytest.raises(UserError, match="--adaptive-softmax-cutoff"):
        build("adaptive_loss")(Model(adaptive=False), SAMPLE)


def test_losses_are_logged_in_bits_per_token() -> None:
    outputs = [
        {"loss": torch.tensor(8.0), "ntokens": 3, "nsentences": 1, "sample_size": 3},
        {"loss": torch.tensor(4.0), "ntokens": 1, "nsentences": 1, "sample_size": 1},
    ]
    with metrics.aggregate(new_root=True) as meters:
        criterions.FairseqCriterion.reduce_metrics(outputs)
    values = meters.get_smoothed_values()
    assert values == {"loss": round(3 / math.log(2), 3), "ppl": round(math.e**3, 2)}


def test_nll_appears_where_sentences_divide_the_loss() -> None:
    outputs = [{"loss": torch.tensor(8.0), "ntokens": 4, "nsentences": 1, "sample_size": 1}]
    with metrics.aggregate(new_root=True) as meters:
        criterions.FairseqCriterion.reduce_metrics(outputs)
    values = meters.get_smoothed_values()
    assert values["nll_loss"] == round(2 / math.log(2), 3) and values["ppl"] == round(math.e**2, 2)
    assert values["loss"] == round(8 / math.log(2), 3)
