"""kNN-LM with random skipping: the baseline curve of the paper's Figures 3 and 4. A skipped token falls back to the
LM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.flag_types import unit_float
from fairseq.retrieval.retrievers.interface import Proposal, Retriever, Step, register_retriever


@register_retriever("random_skip")
class RandomSkipRetriever(Retriever):
    """Skips the search of a token with probability `--skip-probability` (or `--target-foss`, which means the same)."""

    sequential = False
    only_mixes = True
    meets_target = True
    saving_flags = ("skip_probability", "target_foss")

    @staticmethod
    def add_args(parser: Any) -> None:
        """`--skip-probability`."""
        parser.add_argument(
            "--skip-probability", type=unit_float, default=0.5, metavar="P", help="share of searches to skip at random"
        )

    def propose(self, step: Step) -> Proposal:
        """Draws by sample and position, so that the choice does not depend on batching."""
        target = getattr(self.args, "target_foss", None)
        probability = self.args.skip_probability if target is None else target
        skip = uniform(step.sample_ids, step.positions, self.args.seed) < probability
        lmbda = torch.where(skip, 0.0, self.resources.lmbda)
        return Proposal(search=~skip, lmbda=lmbda)


def uniform(sample_ids: Tensor, positions: Tensor, seed: int) -> Tensor:
    """(B,) float64 in [0, 1): a fixed pseudo-random number for each token (the SplitMix64 finaliser of its
    coordinates)."""
    x = sample_ids * 0x632BE59BD9B4E019 + positions * -0x61C8864680B583EB + (seed % (1 << 31)) * 0x2545F491
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
