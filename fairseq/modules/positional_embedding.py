"""Position embeddings of the decoder, fixed (sinusoids) or learned.

Position ids: the first token of a row has `padding_idx + 1`, each further token one more, pads have `padding_idx`,
whose vector is zero. Both classes take ids that the caller computed already as `positions` (B or 1, T)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.errors import UserError


def make_positions(tensor: Tensor, padding_idx: int) -> Tensor:
    """Position ids of tokens (B, T): `padding_idx` plus the number of non-pad tokens so far; pads keep
    `padding_idx`."""
    mask = tensor.ne(padding_idx).long()
    return mask.cumsum(dim=1) * mask + padding_idx


class SinusoidalPositionalEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced frequencies. Nothing is learned; the table grows on demand."""

    _float_tensor: Tensor

    def __init__(self, embedding_dim: int, padding_idx: int, init_size: int = 1024) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.init_size = init_size
        self.weights: Tensor | None = None  # not part of the state: made when first needed, on the device in use
        # fairseq writes this one-element buffer; its content is irrelevant, its type tells the table's type.
        self.register_buffer("_float_tensor", torch.zeros(1))

    @staticmethod
    def get_embedding(num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> Tensor:
        """Table (num_embeddings, embedding_dim) float32; row p = [sin(p f_k)..., cos(p f_k)...].

        With h = embedding_dim // 2, f_k = exp(-k ln(10000) / (h - 1)): fairseq divides by h - 1, not by h."""
        half = embedding_dim // 2
        step = math.log(10000) / max(half - 1, 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
        angles = torch.arange(num_embeddings, dtype=torch.float32).unsqueeze(1) * frequencies
        table = F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))
        if padding_idx is not None:
            table[padding_idx] = 0
        return table

    def forward(self, input: Tensor, incremental_state: Any = None, positions: Tensor | None = None) -> Tensor:
        """Embeddings (B or 1, T, D) of tokens (B, T); `positions` overrides the ids derived from the tokens."""
        if positions is None:
            positions = make_positions(input, self.padding_idx)
        needed = max(self.padding_idx + 1 + input.size(1), self.init_size)
        like = self._float_tensor
        if self.weights is None or self.weights.size(0) < needed or self.weights.device.type == "meta":
            self.weights = self.get_embedding(needed, self.embedding_dim, self.padding_idx)
        self.weights = self.weights.to(device=like.device, dtype=like.dtype)
        return F.embedding(positions, self.weights)

    def max_positions(self) -> int:
        """A nominal limit: the table grows with the input."""
        return 100_000

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Drops a stored table (old files) and supplies the dummy buffer that newer files lack."""
        state_dict.pop(f"{name}.weights", None)
        state_dict.setdefault(f"{name}._float_tensor", torch.zeros(1))


class LearnedPositionalEmbedding(nn.Embedding):
    """One trained vector per position up to a fixed limit."""

    padding_idx: int

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)

    def forward(self, input: Tensor, incremental_state: Any = None, positions: Tensor | None = None) -> Tensor:
        """Embeddings (B or 1, T, D) of tokens (B, T); UserError when the input is longer than the table."""
        if input.size(1) > self.max_positions():
            raise UserError(
                f"an input of {input.size(1)} tokens was found where the model's learned positions allow at most "
                f"{self.max_positions()}; use shorter blocks (--tokens-per-sample)"
            )
        if positions is None:
            positions = make_positions(input, self.padding_idx)
        return F.embedding(positions, self.weight, self.padding_idx)

    def max_positions(self) -> int:
        """The longest input."""
        return self.num_embeddings - self.padding_idx - 1


def PositionalEmbedding(  # noqa: N802  (fairseq's name)
    num_embeddings: int, embedding_dim: int, padding_idx: int, learned: bool = False
) -> LearnedPositionalEmbedding | SinusoidalPositionalEmbedding:
    """Position embeddings for inputs of up to `num_embeddings` tokens (sinusoids: more are made when needed)."""
    size = num_embeddings + padding_idx + 1
    if not learned:
        return SinusoidalPositionalEmbedding(embedding_dim, padding_idx, init_size=size)
    table = LearnedPositionalEmbedding(size, embedding_dim, padding_idx)
    nn.init.normal_(table.weight, mean=0, std=embedding_dim**-0.5)
    nn.init.zeros_(table.weight[padding_idx])
    return table
