"""Optimisers by name (`--optimizer`). `build_optimizer(args, parameters)` and `@register_optimizer("name")`."""

from __future__ import annotations

from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.registry import setup_registry

build_optimizer, register_optimizer, OPTIMIZER_REGISTRY = setup_registry(
    "--optimizer", base_class=FairseqOptimizer, default="nag"
)

from fairseq.optim import adam, adamax, nag, torch_optimizers  # noqa: E402, F401  (importing registers them)
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer  # noqa: E402

__all__ = [
    "OPTIMIZER_REGISTRY",
    "FP16Optimizer",
    "FairseqOptimizer",
    "MemoryEfficientFP16Optimizer",
    "build_optimizer",
    "register_optimizer",
]
