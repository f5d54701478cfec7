"""Learning-rate schedules by name (`--lr-scheduler`): `build_lr_scheduler(args, optimizer)`,
`@register_lr_scheduler("name")`. In the formulas n is the number of completed updates."""

from __future__ import annotations

from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.registry import setup_registry

build_lr_scheduler, register_lr_scheduler, LR_SCHEDULER_REGISTRY = setup_registry(
    "--lr-scheduler", base_class=FairseqLRScheduler, default="fixed"
)

from fairseq.optim.lr_scheduler import (  # noqa: E402, F401  (importing registers them)
    cosine_lr_scheduler,
    fixed_schedule,
    inverse_square_root_schedule,
    polynomial_decay_schedule,
    reduce_lr_on_plateau,
    tri_stage_lr_scheduler,
    triangular_lr_scheduler,
)

__all__ = ["LR_SCHEDULER_REGISTRY", "FairseqLRScheduler", "build_lr_scheduler", "register_lr_scheduler"]
