"""Adaptive input and adaptive softmax."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.errors import UserError
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax, adaptive_softmax

PAD = 1


def make_input(vocab=7, width=8, dim=None, cutoff=(2, 4), factor=2):
    torch.manual_seed(3)
    return AdaptiveInput(vocab, PAD, dim or width, factor, width, list(cutoff))


def make_softmax(kind, vocab=7, width=8, cutoff=(2, 4), factor=2):
    torch.manual_seed(3)
    source = None if kind == "untied" else make_input(vocab, width, cutoff=cutoff, factor=factor)
    tie_proj = kind == "tied"
    return AdaptiveSoftmax(vocab, width, list(cutoff), 0.0, factor, source, tie_proj).eval()


KINDS = ("untied", "tied weights", "tied")


def test_bands_have_their_own_widths_and_projections():
    layer = make_input(vocab=30, width=16, cutoff=(10, 20), factor=4)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "embeddings.0.0.weight": (10, 16),
        "embeddings.0.1.weight": (16, 16),
        "embeddings.1.0.weight": (10, 4),
        "embeddings.1.1.weight": (16, 4),
        "embeddings.2.0.weight": (10, 1),
        "embeddings.2.1.weight": (16, 1),
    }
    assert layer.embeddings[0][0].padding_idx == PAD
    assert layer.embeddings[1][0].padding_idx is None
    assert all(band[0].weight[PAD].abs().max() == 0 for band in layer.embeddings)


def test_initial_weights_are_drawn_when_all_layers_are_made():
    layer = make_input(vocab=30, width=16, cutoff=(10, 20), factor=2)
    torch.manual_seed(3)
    made = [(torch.nn.Embedding(10, dim), torch.nn.Linear(dim, 16, bias=False)) for dim in (16, 8, 4)]
    for band, (table, projection) in enumerate(made):
        torch.nn.init.normal_(table.weight, std=table.weight.size(1) ** -0.5)
        torch.nn.init.zeros_(table.weight[PAD])
        torch.nn.init.xavier_uniform_(projection.weight)
        assert torch.equal(layer.weights_for_band(band)[0], table.weight)
        assert torch.equal(layer.weights_for_band(band)[1], projection.weight)


def test_initial_weights_of_an_untied_softmax_too():
    layer = make_softmax("untied")
    torch.manual_seed(3)
    made = [torch.nn.Linear(a, b, bias=False) for a, b in ((8, 4), (8, 4), (4, 2), (8, 2), (2, 3))]
    found = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    for expected, linear in zip(made, found, strict=True):
        assert torch.equal(torch.nn.init.xavier_uniform_(expected.weight), linear.weight)


def test_input_vectors_are_projected_band_embeddings():
    layer = make_input()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 6]])
    vectors = layer(tokens)
    assert vectors.shape == (2, 3, 8)
    for row, column, band, offset in ((0, 0, 0, 0), (0, 2, 1, 2), (1, 0, 1, 2), (1, 2, 2, 4)):
        table, projection = layer.weights_for_band(band)
        expected = projection @ table[tokens[row, column] - offset]
        torch.testing.assert_close(vectors[row, column], expected)


def test_bands_without_tokens_get_no_gradient():
    layer = make_input()
    layer(torch.tensor([[0, 5]])).sum().backward()
    assert layer.embeddings[0][0].weight.grad is not None
    assert layer.embeddings[1][0].weight.grad is None
    assert layer.embeddings[2][1].weight.grad is not None


@pytest.mark.parametrize("cutoff", [[4, 2], [2, 9], [0], [7]])
def test_cutoffs_must_ascend_within_the_dictionary(cutoff):
    with pytest.raises(UserError, match="ascending"):
        make_input(cutoff=cutoff)


def test_targets_of_the_specification_example():
    layer = make_softmax("untied")
    assert layer.head.weight.shape == (4, 8)
    targets, rows = layer.adapt_target(torch.tensor([1, 3, 6]))
    assert targets[0].tolist() == [1, 2, 3]
    assert targets[1].tolist() == [1]
    assert targets[2].tolist() == [2]
    assert [r.tolist() for r in rows] == [[1], [2]]


def test_log_prob_of_a_tail_word_is_cluster_plus_tail():
    layer = make_softmax("untied")
    x = torch.randn(1, 1, 8)
    head = F.log_softmax(layer.head(x), dim=-1)
    tail = F.log_softmax(layer.tail[1](x), dim=-1)
    expected = head[0, 0, 3] + tail[0, 0, 2]
    torch.testing.assert_close(layer.get_log_prob(x, None)[0, 0, 6], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_is_complete_without_targets(kind):
    layer = make_softmax(kind)
    total = layer.get_log_prob(torch.randn(2, 5, 8), None).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 5))


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), targets=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_three_ways_to_the_target_agree(kind, targets):
    layer = make_softmax(kind)
    target = torch.tensor([targets])
    x = torch.randn(1, len(targets), 8)
    full = layer.get_log_prob(x, None).gather(2, target[..., None])[0, :, 0]
    routed = layer.get_log_prob(x, target).gather(2, target[..., None])[0, :, 0]
    fast = layer.get_target_log_prob(x[0], target[0])
    assert fast.dtype == torch.float32
    torch.testing.assert_close(routed, full, atol=1e-6, rtol=0)
    torch.testing.assert_close(fast, full, atol=1e-6, rtol=0)


def test_chunks_of_rows_change_nothing(monkeypatch):
    layer = make_softmax("tied")
    x, target = torch.randn(40, 8), torch.randint(0, 7, (40,))
    whole = layer.get_target_log_prob(x, target)
    monkeypatch.setattr(adaptive_softmax, "CHUNK_ELEMENTS", 9)
    torch.testing.assert_close(layer.get_target_log_prob(x, target), whole, atol=1e-6, rtol=0)


def test_no_rows_at_all_are_no_error():
    assert make_softmax("tied").get_target_log_prob(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_training_logits_sum_to_the_target_loss():
    layer = make_softmax("tied").train()  # dropout is 0 here
    x, target = torch.randn(2, 6, 8), torch.randint(0, 7, (2, 6))
    outputs, targets = layer(x, target)
    loss = sum(F.cross_entropy(o, t, reduction="sum") for o, t in zip(outputs, targets) if o is not None)
    expected = -layer.get_target_log_prob(x.view(12, 8), target.view(12)).sum()
    torch.testing.assert_close(loss, expected)


def test_empty_tails_have_neither_output_nor_target():
    outputs, targets = make_softmax("untied")(torch.randn(1, 2, 8), torch.tensor([[0, 5]]))
    assert outputs[1] is None
    assert targets[1] is None
    assert outputs[2].shape == (1, 3)


def test_tied_parameters_are_the_inputs_own():
    source = make_input()
    layer = AdaptiveSoftmax(7, 8, [2, 4], 0.0, 2, source, tie_proj=True)
    assert layer.head.word_proj.weight is source.embeddings[0][0].weight
    assert layer.tail[1][0].weight is source.embeddings[2][1].weight
    assert layer.tail[1][2].weight is source.embeddings[2][0].weight
    own = {id(p) for p in layer.parameters()} - {id(p) for p in source.parameters()}
    assert own == {id(layer.head.class_proj.weight)}


def test_head_of_another_width_gets_a_projection():
    layer = AdaptiveSoftmax(7, 8, [2, 4], 0.0, 2, make_input(dim=6), tie_proj=False)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["head.word_proj.0.weight"] == (6, 8)
    assert shapes["head.word_proj.1.weight"] == (2, 6)
    assert shapes["tail.0.0.weight"] == (3, 8)
    assert layer.get_log_prob(torch.randn(1, 1, 8), None).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_half_precision_scores_are_float32():
    layer = make_softmax("tied").bfloat16()
    scores = layer.get_target_log_prob(torch.randn(5, 8).bfloat16(), torch.arange(5))
    assert scores.dtype == torch.float32


def test_files_without_a_version_are_refused():
    with pytest.raises(UserError, match="too old"):
        make_softmax("untied").upgrade_state_dict_named({}, "decoder.adaptive_softmax")
