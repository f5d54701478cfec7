"""One decoder layer: self-attention and feed-forward sublayers with residual sums.

The input of `fc1` in the last layer is the kNN key of the papers (`last_ffn_input`): the layer returns it."""

from __future__ import annotations

import argparse
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.errors import UserError
from fairseq.modules.gelu import get_activation_fn
from fairseq.modules.layer_norm import LayerNorm
from fairseq.modules.multihead_attention import IncrementalState, MultiheadAttention


class TransformerDecoderLayer(nn.Module):
    """Layer norms are before each sublayer (`normalize_before`, always so in transformer_lm) or after the sums.

    Built from the args of the model; attention over an encoder is not part of this package."""

    def __init__(self, args: argparse.Namespace, no_encoder_attn: bool = True) -> None:
        super().__init__()
        if not no_encoder_attn:
            raise UserError(
                "a decoder layer with encoder attention was asked for, but only language models are supported"
            )
        self.embed_dim = args.decoder_embed_dim
        self.dropout = args.dropout
        self.activation_fn = get_activation_fn(getattr(args, "activation_fn", "relu"))
        # checkpoints of older versions have relu_dropout instead
        self.activation_dropout = getattr(args, "activation_dropout", 0) or getattr(args, "relu_dropout", 0)
        self.normalize_before = args.decoder_normalize_before
        self.self_attn = MultiheadAttention(
            self.embed_dim, args.decoder_attention_heads, dropout=args.attention_dropout, self_attention=True
        )
        self.self_attn_layer_norm = LayerNorm(self.embed_dim)
        self.fc1 = _linear(self.embed_dim, args.decoder_ffn_embed_dim)
        self.fc2 = _linear(args.decoder_ffn_embed_dim, self.embed_dim)
        self.final_layer_norm = LayerNorm(self.embed_dim)

    def forward(
        self,
        x: Tensor,
        incremental_state: IncrementalState | None = None,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        need_attn: bool = False,
        skipped: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """x (T, B, D) -> (output (T, B, D), attention weights (B, T, S) or None, input of fc1 (T, B, D)).

        The first `skipped` positions are only attended to: outputs, and the mask given, are those of the others."""
        residual = x[skipped:]
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, weights = self.self_attn(
            x[skipped:], x, x, self_attn_padding_mask, incremental_state, need_attn, self_attn_mask, is_causal=is_causal
        )
        x = residual + F.dropout(x, self.dropout, self.training)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        ffn_input = x
        x = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        x = residual + F.dropout(self.fc2(x), self.dropout, self.training)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, weights, ffn_input

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Gives the numbered layer norms of old files their names."""
        names = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
        for number, new in enumerate(names):
            for kind in ("weight", "bias"):
                old = f"{name}.layer_norms.{number}.{kind}"
                if old in state_dict:
                    state_dict[f"{name}.{new}.{kind}"] = state_dict.pop(old)


def _linear(input_dim: int, output_dim: int) -> nn.Linear:
    layer = nn.Linear(input_dim, output_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
