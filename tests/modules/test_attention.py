"""Attention, activations and the decoder layer against definitions written out."""

import argparse
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fairseq.errors import BadFlag, UserError
from fairseq.modules import MultiheadAttention, TransformerDecoderLayer, gelu, gelu_accurate, get_activation_fn


def reference(layer, x, mask):
    """Attention head by head; x (T, B, D), mask (T, T) added to the scores."""
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    columns = []
    for head in range(layer.num_heads):
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        scores = torch.einsum("tbd,sbd->bts", q[..., part] * layer.head_dim**-0.5, k[..., part]) + mask
        columns.append(torch.einsum("bts,sbd->tbd", scores.softmax(-1), v[..., part]))
    return layer.out_proj(torch.cat(columns, dim=-1))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return MultiheadAttention(12, 3).eval()


def test_causal_attention_matches_the_definition_with_and_without_weights(attention):
    x = torch.randn(7, 2, 12)
    mask = torch.full((7, 7), -math.inf).triu(1)
    expected = reference(attention, x, mask)
    fused, none = attention(x, x, x, need_weights=False, is_causal=True)
    explicit, weights = attention(x, x, x, is_causal=True)
    additive, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    assert none is None
    for result in (fused, explicit, additive):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert weights.shape == (2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    assert weights.triu(1).abs().max() == 0


def test_padded_keys_are_ignored(attention):
    x = torch.randn(5, 1, 12)
    padding = torch.tensor([[False, False, False, True, True]])
    masked, _ = attention(x[:3], x, x, key_padding_mask=padding, need_weights=False)
    short, _ = attention(x[:3], x[:3], x[:3], need_weights=False)
    torch.testing.assert_close(masked, short, atol=1e-6, rtol=0)


def test_one_token_at_a_time_gives_the_same(attention):
    x = torch.randn(6, 2, 12)
    whole, _ = attention(x, x, x, need_weights=False, is_causal=True)
    state = {}
    for t in range(6):
        step, _ = attention(x[t : t + 1], x[t : t + 1], x[t : t + 1], incremental_state=state, need_weights=False)
        torch.testing.assert_close(step[0], whole[t], atol=1e-5, rtol=1e-5)
    assert attention.cached_length(state) == 6
    attention.reorder_incremental_state(state, torch.tensor([1, 1, 0]))
    key = next(iter(state.values()))["prev_key"]
    assert torch.equal(key[0], key[1])
    assert not torch.equal(key[0], key[2])


def test_fused_projection_of_old_files_is_split(attention):
    fused = torch.arange(36 * 12, dtype=torch.float32).view(36, 12)
    state = {"a.in_proj_weight": fused, "a.in_proj_bias": torch.arange(36.0)}
    attention.upgrade_state_dict_named(state, "a")
    assert sorted(state) == sorted(f"a.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias"))
    assert torch.equal(state["a.q_proj.weight"], fused[:12])
    assert torch.equal(state["a.v_proj.bias"], torch.arange(24.0, 36.0))


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="decoder-attention-heads"):
        MultiheadAttention(10, 3)


def test_activations():
    x = torch.linspace(-3, 3, 20)
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(gelu_accurate(x), 0.5 * x * (1 + inner.tanh()))
    assert gelu(x.half()).dtype == torch.float16
    assert get_activation_fn("gelu_fast") is gelu_accurate
    assert torch.equal(get_activation_fn("linear")(x), x)
    with pytest.raises(BadFlag, match="--activation-fn: found swish"):
        get_activation_fn("swish")


def layer_args(**changes):
    options = {
        "decoder_embed_dim": 12,
        "decoder_ffn_embed_dim": 20,
        "decoder_attention_heads": 3,
        "decoder_normalize_before": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_fn": "relu",
    }
    return argparse.Namespace(**{**options, **changes})


@pytest.mark.parametrize("before", [True, False])
def test_layer_returns_its_output_and_the_input_of_fc1(before):
    torch.manual_seed(0)
    layer = TransformerDecoderLayer(layer_args(decoder_normalize_before=before)).eval()
    x = torch.randn(5, 2, 12)
    norm1, norm2 = layer.self_attn_layer_norm, layer.final_layer_norm
    mask = torch.full((5, 5), -math.inf).triu(1)
    if before:
        middle = x + reference(layer.self_attn, norm1(x), mask)
        key = norm2(middle)
        expected = middle + layer.fc2(F.relu(layer.fc1(key)))
    else:
        key = norm1(x + reference(layer.self_attn, x, mask))
        expected = norm2(key + layer.fc2(F.relu(layer.fc1(key))))
    output, weights, ffn_input = layer(x, is_causal=True)
    assert weights is None
    torch.testing.assert_close(ffn_input, key, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_old_options_and_names():
    args = layer_args(activation_dropout=0, relu_dropout=0.25)
    layer = TransformerDecoderLayer(args)
    assert layer.activation_dropout == 0.25
    state = {"l.layer_norms.0.weight": 1, "l.layer_norms.2.bias": 2}
    layer.upgrade_state_dict_named(state, "l")
    assert state == {"l.self_attn_layer_norm.weight": 1, "l.final_layer_norm.bias": 2}


def test_encoder_attention_is_refused():
    with pytest.raises(UserError, match="encoder attention"):
        TransformerDecoderLayer(layer_args(), no_encoder_attn=False)


@pytest.mark.parametrize("heads", [0, -1, 3, 0.5, float("nan"), None])
def test_heads_that_do_not_divide_the_width(heads: Any) -> None:
    """A checkpoint's options may say anything."""
    with pytest.raises(UserError, match="--decoder-attention-heads: found"):
        MultiheadAttention(8, heads)
