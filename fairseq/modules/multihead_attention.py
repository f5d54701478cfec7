"""Multi-head attention (Vaswani et al. 2017), time-major as in fairseq, on PyTorch's fused kernel.

During generation, keys and values of earlier steps are kept in `incremental_state`, a dict that the caller owns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.errors import UserError

IncrementalState = dict[str, Any]
_instances = itertools.count()


class MultiheadAttention(nn.Module):
    """Projections with bias, scaled dot products per head, output projection."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        self_attention: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1 or embed_dim % num_heads != 0:
            raise UserError(
                f"--decoder-attention-heads: found {num_heads}, expected a divisor of the width {embed_dim}; change one"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.self_attention = self_attention
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self._state_key = f"attention.{next(_instances)}"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, with gain 1/sqrt(2) for q, k and v; the output bias starts at zero."""
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query (T, B, D) to key and value (S, B, D).

        key_padding_mask (B, S): True at pads. attn_mask, broadcast to (B, heads, T, S): bool (True = attend) or float
        (added to the scores). is_causal applies the lower-triangular mask without building it, when T = S.
        Returns ((T, B, D), weights averaged over heads (B, T, S), or None without `need_weights`)."""
        q, k, v = (self._split(p(x)) for p, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        if incremental_state is not None:
            k, v = self._extend(incremental_state, k, v)
        mask = _combine(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            if is_causal:
                causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
                mask = _combine(causal, key_padding_mask, q)
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            probabilities = F.softmax(scores.float(), dim=-1)
            weights = probabilities.mean(dim=1)
            heads = F.dropout(probabilities.type_as(v), dropout, training=self.training) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal and mask is None)
        length, batch = query.shape[:2]
        return self.out_proj(heads.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)), weights

    def _split(self, x: Tensor) -> Tensor:
        """(T, B, D) -> (B, heads, T, head_dim), a view."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _extend(self, incremental_state: IncrementalState, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends this step's keys and values to the stored ones; stores and returns all."""
        cached = incremental_state.get(self._state_key)
        if cached is not None:
            k, v = torch.cat([cached["prev_key"], k], dim=2), torch.cat([cached["prev_value"], v], dim=2)
        incremental_state[self._state_key] = {"prev_key": k, "prev_value": v}
        return k, v

    def cached_length(self, incremental_state: IncrementalState) -> int:
        """Number of positions whose keys and values are stored."""
        cached = incremental_state.get(self._state_key)
        return 0 if cached is None else cached["prev_key"].size(2)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> None:
        """Selects rows of the batch in the stored keys and values (beam search)."""
        cached = incremental_state.get(self._state_key)
        if cached is not None:
            incremental_state[self._state_key] = {name: x.index_select(0, new_order) for name, x in cached.items()}

    def crop_incremental_state(self, incremental_state: IncrementalState, count: int) -> None:
        """Forgets the stored keys and values of the last `count` positions."""
        cached = incremental_state.get(self._state_key)
        if cached is not None and count:
            incremental_state[self._state_key] = {name: x[:, :, :-count] for name, x in cached.items()}

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Splits the fused input projection of old files into q, k and v (in this order)."""
        for kind in ("weight", "bias"):
            fused = state_dict.pop(f"{name}.in_proj_{kind}", None)
            if fused is not None:
                for part, value in zip("qkv", fused.chunk(3, dim=0)):
                    state_dict[f"{name}.{part}_proj.{kind}"] = value


def _combine(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """One mask for the kernel: bool (True = attend) or float in the type of `like`; None when nothing is masked."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(like.dtype)
    if key_padding_mask is None:
        return attn_mask
    padded = key_padding_mask.bool()[:, None, None, :]
    if attn_mask is None:
        return ~padded
    if attn_mask.dtype == torch.bool:
        return attn_mask & ~padded
    return attn_mask.masked_fill(padded, -math.inf)
