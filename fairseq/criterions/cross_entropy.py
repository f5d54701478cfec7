"""Cross-entropy over the whole vocabulary; padding targets do not count."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.fairseq_criterion import LossResult


@register_criterion("cross_entropy")
class CrossEntropyCriterion(FairseqCriterion):
    """Negative log-likelihood in nats from float32 log-probabilities."""

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> LossResult:
        net_output = model(**sample["net_input"])
        loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        return self.result(loss, sample, sample["ntokens"])

    def compute_loss(
        self, model: Any, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(loss, loss), summed or per target (N,); a pair because smoothing losses return two different ones."""
        log_probs = model.get_normalized_probs(net_output, log_probs=True)
        target = model.get_targets(sample, net_output).reshape(-1)
        loss = F.nll_loss(
            log_probs.view(-1, log_probs.size(-1)),
            target,
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )
        return loss, loss
