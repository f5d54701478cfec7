"""Adaptive input embeddings (Baevski & Auli 2019, https://arxiv.org/abs/1809.10853): frequent words get wide
vectors, rare ones narrow vectors, and each band is projected to the model's width."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.errors import UserError


def close_cutoffs(cutoff: list[int], vocab_size: int, flag: str) -> list[int]:
    """The cutoffs with the vocabulary size as last bound; UserError unless they ascend within the vocabulary."""
    bounds = list(cutoff) if cutoff and cutoff[-1] == vocab_size else [*cutoff, vocab_size]
    if len(bounds) < 2 or bounds[0] <= 0 or any(low >= high for low, high in pairwise(bounds)):
        raise UserError(
            f"{flag}: found {','.join(map(str, cutoff))}, expected ascending word ids below the dictionary's size "
            f"{vocab_size}; for a new model choose smaller ones, such as {max(1, vocab_size // 8)},"
            f"{max(2, vocab_size // 2)}; a trained one needs the dictionary that it was made for"
        )
    return bounds


class AdaptiveInput(nn.Module):
    """Embeds token ids; band i holds ids from cutoff i-1 to cutoff i in initial_dim / factor^i dimensions."""

    _float_tensor: Tensor

    def __init__(
        self,
        vocab_size: int,
        padding_idx: int,
        initial_dim: int,
        factor: float,
        output_dim: int,
        cutoff: list[int],
    ) -> None:
        super().__init__()
        self.cutoff = close_cutoffs(cutoff, vocab_size, "--adaptive-input-cutoff")
        self.embedding_dim = output_dim
        self.padding_idx = padding_idx
        self.embeddings = nn.ModuleList()
        for band, (low, high) in enumerate(pairwise([0, *self.cutoff])):
            dim = int(initial_dim // factor**band)
            table = nn.Embedding(high - low, dim, padding_idx if band == 0 else None)
            self.embeddings.append(nn.Sequential(table, nn.Linear(dim, output_dim, bias=False)))
        for band in range(len(self.cutoff)):  # after all are made: layers draw random numbers when they are made, too
            table_weight, projection_weight = self.weights_for_band(band)
            nn.init.normal_(table_weight, mean=0, std=table_weight.size(1) ** -0.5)
            # Row `padding_idx` starts at zero in every band, although only band 0 holds the pad token.
            if padding_idx < table_weight.size(0):
                nn.init.zeros_(table_weight[padding_idx])
            nn.init.xavier_uniform_(projection_weight)
        self.register_buffer("_float_tensor", torch.zeros(1))

    def weights_for_band(self, band: int) -> tuple[nn.Parameter, nn.Parameter]:
        """(embedding (size, dim), projection (output_dim, dim)) of one band, for tying with the adaptive softmax."""
        pair: Any = self.embeddings[band]
        return pair[0].weight, pair[1].weight

    def forward(self, input: Tensor) -> Tensor:
        """Vectors (*, output_dim) of token ids (*)."""
        tokens = input.reshape(-1)
        result = self.weights_for_band(0)[1].new_zeros(tokens.numel(), self.embedding_dim)
        for band, (low, high) in enumerate(pairwise([0, *self.cutoff])):
            rows = ((tokens >= low) & (tokens < high)).nonzero().squeeze(1)
            if rows.numel() > 0:  # an unused band gets no gradient at all, as in fairseq
                result.index_copy_(0, rows, self.embeddings[band](tokens[rows] - low).to(result.dtype))
        return result.view(*input.shape, self.embedding_dim)
