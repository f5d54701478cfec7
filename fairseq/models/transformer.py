"""The transformer decoder: embeddings and positions, layers under a causal mask, output layer.

Features can be read off at every level: `extra["inner_states"]` holds the embedding output and each layer's output, and
with `args.knn_keytype` also `extra["last_ffn_input"]`, the kNN key of the papers, and `extra["final_hidden"]`, what the
output layer reads; all T x B x D. Key types are made of them (`fairseq.key_types`)."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq import utils
from fairseq.key_types import FFN_INPUT, FINAL_HIDDEN, key_type_named
from fairseq.models.fairseq_decoder import FairseqIncrementalDecoder, NetOutput
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax, LayerNorm, PositionalEmbedding, TransformerDecoderLayer


class TransformerDecoder(FairseqIncrementalDecoder):
    """A stack of `TransformerDecoderLayer` on given token embeddings (an Embedding or an AdaptiveInput)."""

    version: Tensor

    def __init__(
        self, args: argparse.Namespace, dictionary: Any, embed_tokens: Any, no_encoder_attn: bool = True
    ) -> None:
        super().__init__(dictionary)
        self.register_buffer("version", torch.tensor([3.0]))
        self.dropout = args.dropout
        self.decoder_layerdrop = getattr(args, "decoder_layerdrop", 0) or 0
        self.share_input_output_embed = args.share_decoder_input_output_embed
        self.knn_keytype = getattr(args, "knn_keytype", None)
        if self.knn_keytype is not None:
            key_type_named(self.knn_keytype)  # says so when there is none of this name
        width, input_dim, output_dim = args.decoder_embed_dim, embed_tokens.embedding_dim, args.decoder_output_dim
        self.embed_dim = width
        self.output_embed_dim = output_dim
        self.padding_idx = embed_tokens.padding_idx
        self.max_target_positions = args.max_target_positions
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if args.no_scale_embedding else math.sqrt(width)  # the layers' width, not input_dim
        self.project_in_dim = Linear(input_dim, width, bias=False) if input_dim != width else None
        self.embed_positions = (
            None
            if args.no_token_positional_embeddings
            else PositionalEmbedding(args.max_target_positions, width, self.padding_idx, args.decoder_learned_pos)
        )
        self.layers = nn.ModuleList(TransformerDecoderLayer(args, no_encoder_attn) for _ in range(args.decoder_layers))
        tied = args.tie_adaptive_weights
        self.project_out_dim = Linear(width, output_dim, bias=False) if width != output_dim and not tied else None
        self._build_output(args, len(dictionary))
        final_norm = args.decoder_normalize_before and not getattr(args, "no_decoder_final_norm", False)
        self.layer_norm = LayerNorm(width) if final_norm else None
        self.layernorm_embedding = LayerNorm(width) if getattr(args, "layernorm_embedding", False) else None

    def _build_output(self, args: argparse.Namespace, vocab_size: int) -> None:
        """The adaptive softmax, or an output matrix of its own, or nothing when the input embeddings are shared."""
        self.adaptive_softmax = None
        self.embed_out: nn.Parameter | None = None
        if args.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = AdaptiveSoftmax(
                vocab_size,
                self.output_embed_dim,
                utils.eval_str_list(args.adaptive_softmax_cutoff, int, "--adaptive-softmax-cutoff") or [],
                dropout=args.adaptive_softmax_dropout,
                factor=args.adaptive_softmax_factor,
                adaptive_inputs=self.embed_tokens if args.tie_adaptive_weights else None,
                tie_proj=args.tie_adaptive_proj,
            )
        elif not self.share_input_output_embed:
            self.embed_out = nn.Parameter(torch.empty(vocab_size, self.output_embed_dim))
            nn.init.normal_(self.embed_out, mean=0, std=self.output_embed_dim**-0.5)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        first_needed: int = 0,
        **extra_args: Any,
    ) -> NetOutput:
        """Tokens (B, T) -> (logits (B, T, V), or features (B, T, D) where an adaptive softmax follows; extra).

        With `incremental_state` only the positions not seen before are computed and returned. With `features_only` the
        output layer is left out and extra["features_only"] is set, which `get_target_log_probs` understands. Of the
        positions before `first_needed`, which does not go with `incremental_state`, nothing is returned, and nothing
        computed in the last layer but what later ones attend to."""
        x, extra = self.extract_features(
            prev_output_tokens, encoder_out, incremental_state, first_needed=first_needed
        )
        if features_only:
            extra["features_only"] = True
            return x, extra
        return self.output_layer(x), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        first_needed: int = 0,
        **kwargs: Any,
    ) -> NetOutput:
        """Features (B, T - first_needed, output dim) and extra: attn, inner_states and, when asked for, the kNN
        keys."""
        seen = 0 if incremental_state is None else self._cached_length(incremental_state)
        mask, is_causal, positions = self._mask_and_positions(prev_output_tokens, seen)
        x = self._embed(prev_output_tokens, seen, positions).transpose(0, 1)
        inner_states = [x]
        ffn_input = None
        for layer in self.layers:
            if self.training and self.decoder_layerdrop > 0 and torch.rand(()).item() <= self.decoder_layerdrop:
                continue
            skipped = 0
            if layer is self.layers[-1] and first_needed > 0:
                mask = causal_mask(x.size(0), x.device) if mask is None else mask
                skipped, mask, is_causal = first_needed, mask[..., first_needed:, :], False
            x, _, ffn_input = layer(x, incremental_state, mask, is_causal=is_causal, skipped=skipped)
            inner_states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)
        extra: dict[str, Any] = {"attn": [None], "inner_states": inner_states}
        if self.knn_keytype is not None:
            extra |= {FFN_INPUT: ffn_input, FINAL_HIDDEN: x.transpose(0, 1)}
        return x, extra

    def _embed(self, tokens: Tensor, seen: int, positions: Tensor) -> Tensor:
        x = self.embed_scale * self.embed_tokens(tokens[:, seen:])
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(tokens, positions=positions)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return F.dropout(x, self.dropout, self.training)

    def _cached_length(self, incremental_state: dict[str, Any]) -> int:
        return self.layers[0].self_attn.cached_length(incremental_state)  # type: ignore[union-attr, operator]

    def _mask_and_positions(self, tokens: Tensor, seen: int) -> tuple[Tensor | None, bool, Tensor]:
        """(mask or None, is_causal, position ids) for the positions from `seen` on.

        With pads on the right only, no real position can attend to one, so the kernel's own causal mask is enough. The
        outputs at pads then differ from fairseq's, where pads do not attend to pads; nothing reads them."""
        batch, length = tokens.shape
        padded = tokens.eq(self.padding_idx)
        has_pad, pads_precede = torch.stack([padded.any(), (padded[:, :-1] & ~padded[:, 1:]).any()]).tolist()
        if has_pad:
            positions = utils.make_positions(tokens, self.padding_idx)
        else:
            positions = torch.arange(length, device=tokens.device).unsqueeze(0) + self.padding_idx + 1
        positions = positions[:, seen:]
        if not pads_precede and seen == 0:
            return None, True, positions
        if not pads_precede and length - seen == 1:
            return None, False, positions  # a single new position sees everything before it
        causal = causal_mask(length, tokens.device)[seen:]
        # Pads attend to themselves: a row that may attend to nothing would be NaN and spread.
        diagonal = torch.eye(length, dtype=torch.bool, device=tokens.device)[seen:]
        return causal & (~padded[:, None, None, :] | diagonal), False, positions

    def output_layer(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Features -> logits (B, T, V); unchanged where an adaptive softmax follows."""
        if self.adaptive_softmax is not None:
            return features
        return F.linear(features, self.embed_tokens.weight if self.embed_out is None else self.embed_out)

    def max_positions(self) -> int:
        """The longest input: the smaller of `max_target_positions` and the position table."""
        if self.embed_positions is None:
            return self.max_target_positions
        return min(self.max_target_positions, self.embed_positions.max_positions())

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Reads files of other versions.

        Files of decoder version 2 or older come from models without a final layer norm, so it is removed. The output
        matrix of newer files is renamed, or dropped where it repeats the shared embeddings."""
        version = state_dict.get(f"{name}.version")
        if version is None or version[0] <= 2:
            self.layer_norm = None
            state_dict[f"{name}.version"] = torch.tensor([1.0])
        if self.adaptive_softmax is None:
            output = state_dict.pop(f"{name}.output_projection.weight", None)
            if output is not None and self.embed_out is not None:
                state_dict.setdefault(f"{name}.embed_out", output)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """(length, length) bool: whether a position (row) may attend to another (column)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def Embedding(num_embeddings: int, embedding_dim: int, padding_idx: int) -> nn.Embedding:  # noqa: N802
    """Token embeddings, N(0, 1/dim), the pad row zero."""
    table = nn.Embedding(num_embeddings, embedding_dim, padding_idx=padding_idx)
    nn.init.normal_(table.weight, mean=0, std=embedding_dim**-0.5)
    nn.init.zeros_(table.weight[padding_idx])
    return table


def Linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:  # noqa: N802
    """A linear layer, xavier-uniform with zero bias."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


__all__ = ["AdaptiveInput", "Embedding", "Linear", "TransformerDecoder", "TransformerDecoderLayer"]
