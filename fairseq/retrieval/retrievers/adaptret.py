"""AdaptRet (He et al., 2021): a learned weight decides, before the search, whether to search for a token. And RetoMaton
with AdaptRet, which the RetoMaton paper leaves as future work: the learned weight is the lambda of the candidates that
pointers give, and a search is made where too few pointers are left *and* the learned weight is large enough."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import BadFlag
from fairseq.flag_types import unit_float
from fairseq.refusals import refuse
from fairseq.retrieval.datastore.provenance import check_gate
from fairseq.retrieval.retrievers.adaptret_network import SMALLEST_WEIGHT, AdaptRet
from fairseq.retrieval.retrievers.interface import Proposal, Resources, Retriever, Step, register_retriever
from fairseq.retrieval.retrievers.ngrams import NgramTable
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever


class Gate:
    """A checkpoint's network and n-gram counts, applied to steps."""

    def __init__(self, args: argparse.Namespace, device: torch.device | str) -> None:
        self.model, self.device = load_gate(args), device
        self.model.network.to(device)
        self.ngrams = None
        if {"freq", "fert"} & set(self.model.recipe.features):
            folder = args.adaptret_ngrams or self.model.info.get("ngrams")
            if not isinstance(folder, str):
                expected = "the folder of the n-gram counts that it was trained with"
                raise BadFlag("--adaptret-ngrams", "nothing", expected)
            self.ngrams = NgramTable.open(folder)
            self._check_text(args.adaptret_checkpoint, folder, self.ngrams)

    def _check_text(self, path: str, folder: str, ngrams: NgramTable) -> None:
        """Refuses counts of another text than the one the gate was trained with."""
        recorded = self.model.info.get("ngrams_of")
        if isinstance(recorded, dict) and recorded != ngrams.identity:
            found, expected = f"{folder}, counts of another text", f"those of the text that {path} was trained with"
            remedy = "give the folder that fairseq-adaptret made for it, or go on with --force"
            refuse(BadFlag("--adaptret-ngrams", found, expected, remedy))

    def log_weights(self, step: Step) -> Tensor:
        """(B, 2): log-weights of LM and retrieval."""
        if step.queries.shape[1] != self.model.dimension:
            found = f"a network for queries of width {self.model.dimension}"
            raise BadFlag("--adaptret-checkpoint", found, f"one for the model's width {step.queries.shape[1]}")
        features = {"ctxt": step.queries}
        features["lm_max"] = step.features["lm_max"][:, None]
        features["lm_ent"] = step.features["lm_entropy"][:, None]
        if self.ngrams is not None:
            counts = self.ngrams.look_up(step.features["context"].cpu().numpy())
            features |= {name: torch.from_numpy(c).to(self.device) for name, c in zip(("freq", "fert"), counts)}
        return self.model.weights(features)


def load_gate(args: argparse.Namespace) -> AdaptRet:
    """The checkpoint that the flags name."""
    if args.adaptret_checkpoint is None:
        raise BadFlag("--adaptret-checkpoint", "nothing", "a file that fairseq-adaptret wrote")
    return AdaptRet.load(args.adaptret_checkpoint)


def check_gate_query_model(args: argparse.Namespace, query_model: Mapping[str, Any], places: Sequence[str]) -> None:
    """`Retriever.check_query_model` of strategies with a learned gate."""
    model = load_gate(args)
    of = model.info.get("of")
    check_gate(args.adaptret_checkpoint, of if isinstance(of, dict) else {}, query_model, places)


def weight_of(log_weights: Tensor) -> Tensor:
    """(B,): retrieval's weight for tokens with candidates, at least SMALLEST_WEIGHT."""
    return (1 - log_weights[:, 0].exp()).clamp(SMALLEST_WEIGHT, 1)


def add_gate_args(parser: Any) -> None:
    """The flags of strategies with a learned gate."""
    parser.add_argument("--adaptret-checkpoint", metavar="FILE", help="what fairseq-adaptret trained")
    parser.add_argument("--adaptret-ngrams", metavar="DIR", help="its n-gram counts (default: where they were made)")


@register_retriever("adaptret")
class AdaptRetRetriever(Retriever):
    """Searches for tokens whose learned LM weight is below the threshold for `--target-foss` (default 0.5). These are
    mixed with the learned weights; other tokens have the LM's probability."""

    sequential = False
    meets_target = True
    needs = frozenset({"lm_max", "lm_entropy", "context"})
    check_query_model = staticmethod(check_gate_query_model)

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        self.gate = Gate(args, resources.device)
        target = getattr(args, "target_foss", None)
        self.threshold = self.gate.model.threshold(0.5 if target is None else target)

    @staticmethod
    def add_args(parser: Any) -> None:
        """`--adaptret-checkpoint`, `--adaptret-ngrams`."""
        add_gate_args(parser)

    def propose(self, step: Step) -> Proposal:
        """Decides from the features alone."""
        log_weights = self.gate.log_weights(step)
        search = log_weights[:, 0] < self.threshold
        return Proposal(search=search, lmbda=torch.where(search, weight_of(log_weights), 0.0))


@register_retriever("retomaton_adaptret")
class RetomatonAdaptRetRetriever(RetomatonRetriever):
    """RetoMaton whose lambda is the learned weight. `--min-knns` (and so `--target-foss`) decides when to search; with
    `--gate-foss G`, searches that AdaptRet would skip at a share of G are skipped too."""

    only_mixes = False
    needs = AdaptRetRetriever.needs
    saving_flags = ("min_knns", "target_foss", "gate_foss")
    check_query_model = staticmethod(check_gate_query_model)

    def __init__(self, args: argparse.Namespace, resources: Resources) -> None:
        super().__init__(args, resources)
        self.gate = Gate(args, resources.device)
        self.threshold = self.gate.model.threshold(args.gate_foss)

    @staticmethod
    def add_args(parser: Any) -> None:
        """The gate's flags and `--gate-foss`."""
        add_gate_args(parser)
        parser.add_argument(
            "--gate-foss",
            type=unit_float,
            default=0.0,
            metavar="G",
            help="never search the share G of tokens for which the gate expects least",
        )

    def propose(self, step: Step) -> Proposal:
        """As RetoMaton; a token without any candidate has the LM's probability."""
        proposal = super().propose(step)
        log_weights = self.gate.log_weights(step)
        search = proposal.search & (log_weights[:, 0] < self.threshold)
        has_votes = search if proposal.entries is None else search | (proposal.entries.counts(len(step)) > 0)
        return Proposal(search, proposal.entries, torch.where(has_votes, weight_of(log_weights), 0.0))
