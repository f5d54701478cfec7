"""Layer normalisation under fairseq's name; PyTorch's kernel gives the numbers of the apex one."""

from __future__ import annotations

from torch import nn


def LayerNorm(  # noqa: N802  (fairseq's name)
    normalized_shape: int | list[int], eps: float = 1e-5, elementwise_affine: bool = True, export: bool = False
) -> nn.LayerNorm:
    """A layer norm with fairseq's default epsilon; `export` is accepted and has no effect."""
    return nn.LayerNorm(normalized_shape, eps, elementwise_affine)
