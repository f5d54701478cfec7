"""RetoMaton with chains and AdaptRet: chains decide which entries vote and when to search, and lambda is moved towards
the weight that AdaptRet's network predicts for the token. It is moved only a part of the way, because the network has
no information about chains, and was trained on the results of searches, on little text."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fairseq.flag_types import unit_float
from fairseq.retrieval.retrievers.adaptret import (
    AdaptRetRetriever,
    Gate,
    add_gate_args,
    check_gate_query_model,
    weight_of,
)
from fairseq.retrieval.retrievers.chains import ChainsRetriever
from fairseq.retrieval.retrievers.interface import Proposal, Resources, Step, register_retriever

EXTREME = 1e-4  # weights are clamped to at least this distance from 0 and 1 before their odds are computed


@register_retriever("retomaton_chains_adaptret")
class ChainsAdaptRetRetriever(ChainsRetriever):
    """The odds of chains' lambda times (the network's odds / the odds of `--lmbda`) ** `--chain-gate`."""

    needs = AdaptRetRetriever.needs
    check_query_model = staticmethod(check_gate_query_model)

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        self.gate = Gate(args, resources.device)

    @staticmethod
    def add_args(parser: Any) -> None:
        """The flags of chains and of the gate, and `--chain-gate`."""
        ChainsRetriever.add_args(parser)
        add_gate_args(parser)
        parser.add_argument(
            "--chain-gate",
            type=unit_float,
            default=0.3,
            metavar="G",
            help="how far lambda follows the learned weight, from 0 (not at all) to 1",
        )

    def propose(self, step: Step) -> Proposal:
        """As chains, but lambda also depends on the learned weight."""
        proposal = super().propose(step)
        assert proposal.lmbda is not None
        learned = weight_of(self.gate.log_weights(step)).clamp(EXTREME, 1 - EXTREME)
        constant = torch.tensor(self.resources.lmbda, device=learned.device).clamp(EXTREME, 1 - EXTREME)
        change = self.args.chain_gate * (torch.logit(learned) - torch.logit(constant))
        proposal.lmbda = torch.sigmoid(torch.logit(proposal.lmbda, eps=1e-7) + change)
        return proposal
