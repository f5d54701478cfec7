"""Bases of decoders: how features become logits and how logits become log-probabilities."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NetOutput = tuple[Tensor, dict[str, Any]]


class FairseqDecoder(nn.Module):
    """A module that turns tokens into (features or logits (B, T, *), extra)."""

    def __init__(self, dictionary: Any) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.adaptive_softmax: Any = None

    def forward(self, prev_output_tokens: Tensor, encoder_out: Any = None, **kwargs: Any) -> NetOutput:
        """Logits (B, T, V), or features where an adaptive softmax follows, and a dict of extras."""
        features, extra = self.extract_features(prev_output_tokens, encoder_out=encoder_out, **kwargs)
        return self.output_layer(features), extra

    def extract_features(self, prev_output_tokens: Tensor, encoder_out: Any = None, **kwargs: Any) -> NetOutput:
        """Features (B, T, D) and a dict of extras; to be defined by each decoder."""
        raise TypeError(f"{type(self).__name__} must define extract_features")

    def output_layer(self, features: Tensor) -> Tensor:
        """Features (B, T, D) -> logits (B, T, V); to be defined by each decoder."""
        raise TypeError(f"{type(self).__name__} must define output_layer")

    def get_normalized_probs(self, net_output: NetOutput, log_probs: bool, sample: Any = None) -> Tensor:
        """(Log-)probabilities (B, T, V) of a model output.

        With an adaptive softmax and a `sample` that has "target" (B, T), only the target entry of each row is
        meaningful; pass None for whole distributions. A plain softmax is computed in float32."""
        if self.adaptive_softmax is not None:
            target = None if sample is None else sample["target"]
            result = self.adaptive_softmax.get_log_prob(net_output[0], target)
            return result if log_probs else result.exp_()
        logits = net_output[0].float()
        return F.log_softmax(logits, dim=-1) if log_probs else F.softmax(logits, dim=-1)

    def max_positions(self) -> int | float:
        """The longest input in tokens."""
        return 1_000_000


class FairseqIncrementalDecoder(FairseqDecoder):
    """A decoder that can be called once per generated token, with a dict in which its layers keep their state."""

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Rearranges the batch rows of the state after a beam search step."""
        for module in self.modules():
            if module is not self and hasattr(module, "reorder_incremental_state"):
                module.reorder_incremental_state(incremental_state, new_order)  # type: ignore[operator]

    def crop_incremental_state(self, incremental_state: dict[str, Any], count: int) -> None:
        """Forgets the last `count` positions, of a draft that was not accepted."""
        for module in self.modules():
            if module is not self and hasattr(module, "crop_incremental_state"):
                module.crop_incremental_state(incremental_state, count)  # type: ignore[operator]
