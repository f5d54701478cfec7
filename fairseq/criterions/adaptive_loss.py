"""The loss of models with an adaptive softmax (Grave et al., 2017): cross-entropy of the head over all
targets plus that of each tail cluster over the targets that fall into it.

Quirk reproduced: the padding id (1) is the ignore index of the tails as well, where targets are counted from the
cluster's first word. The second word of each tail (ids 20001 and 60001 in the WikiText-103 recipe) thus has no tail
loss here, although it is counted. `eval_lm.py` does not use this loss."""

from __future__ import annotations

import argparse
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.fairseq_criterion import LossResult, count_tokens
from fairseq.errors import BadFlag, UserError


@register_criterion("adaptive_loss")
class AdaptiveLoss(FairseqCriterion):
    """Needs a model whose decoder has `adaptive_softmax`. Sums are float32 also when the model is in half precision
    (the original sums in the features' type)."""

    @classmethod
    def build_criterion(cls, args: argparse.Namespace, task: Any) -> AdaptiveLoss:
        several = getattr(args, "distributed_world_size", 1) > 1  # fairseq refuses these for one process too
        if several and getattr(args, "ddp_backend", None) in ("c10d", "pytorch_ddp"):
            raise BadFlag(
                "--ddp-backend",
                args.ddp_backend,
                "no_c10d with --criterion adaptive_loss, whose clusters without targets are unused parameters",
                "pass --ddp-backend no_c10d",
            )
        return cls(args, task)

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> LossResult:
        decoder: Any = getattr(model, "decoder", None)
        adaptive_softmax = getattr(decoder, "adaptive_softmax", None)
        if adaptive_softmax is None:
            raise UserError(
                "--criterion adaptive_loss: found a model without adaptive softmax, expected one with "
                "--adaptive-softmax-cutoff; pass it, or use --criterion cross_entropy"
            )
        net_output = model(**sample["net_input"])
        target = model.get_targets(sample, net_output).reshape(-1)
        loss = self.compute_loss(adaptive_softmax, net_output[0], target, reduce)
        return self.result(loss, sample, count_tokens(target, self.padding_idx))

    def compute_loss(
        self, adaptive_softmax: nn.Module, features: Tensor, target: Tensor, reduce: bool = True
    ) -> Tensor:
        """Loss of `features` (B, T, D) for `target` (B * T,): the sum, or one value per target."""
        logits, targets = adaptive_softmax(features, target)
        parts = [
            None if x is None else self._cluster_loss(x, y, reduce) for x, y in zip(logits, targets, strict=True)
        ]
        loss = parts[0]
        assert loss is not None
        if reduce:
            return sum((part for part in parts[1:] if part is not None), loss)
        rows: Any = adaptive_softmax.adapt_target(target)[1]  # type: ignore[operator]
        for index, part in zip(rows, parts[1:], strict=True):
            if part is not None:
                loss = loss.index_add(0, index, part)
        return loss

    def _cluster_loss(self, logits: Tensor, target: Tensor, reduce: bool) -> Tensor:
        reduction = "sum" if reduce else "none"
        return F.cross_entropy(logits.float(), target, ignore_index=self.padding_idx, reduction=reduction)
