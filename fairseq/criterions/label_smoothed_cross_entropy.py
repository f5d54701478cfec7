"""Cross-entropy against a target smoothed with the uniform distribution (Szegedy et al., 2016)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.fairseq_criterion import LossResult
from fairseq.flag_types import unit_float


@register_criterion("label_smoothed_cross_entropy")
class LabelSmoothedCrossEntropyCriterion(FairseqCriterion):
    """(1 - e) nll + e / V times the sum of -log p over the vocabulary."""

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--label-smoothing", default=0.0, type=unit_float, metavar="E", help="uniform part")

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> LossResult:
        net_output = model(**sample["net_input"])
        loss, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        return self.result(loss, sample, sample["ntokens"], nll_loss=nll_loss)

    def compute_loss(
        self, model: Any, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(smoothed loss, nll), summed or per target (N,)."""
        log_probs = model.get_normalized_probs(net_output, log_probs=True)
        log_probs = log_probs.view(-1, log_probs.size(-1))
        target = model.get_targets(sample, net_output).reshape(-1)
        counts = target.ne(self.padding_idx)
        nll = -log_probs.gather(1, target.unsqueeze(1)).squeeze(1) * counts
        uniform = -log_probs.sum(dim=-1) * counts
        if reduce:
            nll, uniform = nll.sum(), uniform.sum()
        smoothing = self.args.label_smoothing
        return (1 - smoothing) * nll + smoothing / log_probs.size(-1) * uniform, nll
