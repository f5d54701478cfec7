"""Losses by name (`--criterion`): `build_criterion(args, task)`, `@register_criterion("name")`."""

from __future__ import annotations

from fairseq.criterions.fairseq_criterion import FairseqCriterion
from fairseq.registry import setup_registry

build_criterion, register_criterion, CRITERION_REGISTRY = setup_registry(
    "--criterion", base_class=FairseqCriterion, default="cross_entropy"
)

from fairseq.criterions import adaptive_loss, cross_entropy, label_smoothed_cross_entropy  # noqa: E402, F401

__all__ = ["CRITERION_REGISTRY", "FairseqCriterion", "build_criterion", "register_criterion"]
