"""kNN-LM (Khandelwal et al., 2020): a search for every token."""

from __future__ import annotations

import torch

from fairseq.retrieval.retrievers.interface import Proposal, Retriever, Step, register_retriever


@register_retriever("knnlm")
class KNNLMRetriever(Retriever):
    """Searches always and follows no pointers; what `--no-pointer` selects."""

    sequential = False
    only_mixes = True

    def propose(self, step: Step) -> Proposal:
        """Every token is searched."""
        return Proposal(search=torch.ones(len(step), dtype=torch.bool, device=step.positions.device))
