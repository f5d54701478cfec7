"""Helpers of the tests of attached retrieval: a random datastore, and retrieval as one would write it by hand, for one
text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.attached_retrieval import Retrieval
from fairseq.retrieval.retrievers import Candidates, Step
from fairseq.retrieval.voting import count_votes
from tests.huggingface.families import VOCABULARY

ENTRIES = 3000
GENERATED = {"do_sample": False, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}


def random_datastore(folder: Path, width: int = 32, seed: int = 0) -> Path:
    """Prefix of a datastore with random keys, and values that follow each other in one of a few ways."""
    random = np.random.default_rng(seed)
    random.normal(size=(ENTRIES, width)).astype(np.float32).tofile(folder / "random_keys.npy")
    random.integers(0, VOCABULARY, ENTRIES).astype(np.int64).tofile(folder / "random_vals.npy")
    return folder / "random"


def opened(prefix: Path | str | None, **settings: Any) -> Retrieval:
    given = {"index": "exact", "k": 64, "lmbda": 0.4, "knn_temp": 30.0, "dstore_size": ENTRIES, **settings}
    return Retrieval.open(prefix and str(prefix), **given)


class ByHand:
    """Retrieval in a loop of our own over the positions of one text: (T, V), the mixture's log-probabilities after
    each of its tokens."""

    def __init__(self, network: Any, retrieval: Retrieval) -> None:
        self.network = network
        self.collector, width, vocabulary = retrieval._look_at(network)
        self.knnlm = retrieval._knnlm(width, vocabulary, network.device)

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        knnlm = self.knnlm
        with self.collector.collecting() as collected:
            logits = self.network(input_ids=torch.tensor([tokens])).logits[0].float()
            queries = next(iter(collected.values())).reshape(len(tokens), -1).float()
        retriever = knnlm.retriever.twin()
        retriever.start()
        result = []
        for place, token in enumerate([*tokens[1:], 0]):
            step = Step(torch.zeros(1, dtype=torch.int64), torch.tensor([place]), queries[place : place + 1])
            proposal, searched, given = knnlm.retrieve(step, retriever)
            candidates = Candidates.of(1, searched, given, knnlm.values, knnlm.temperature)
            _, values, probabilities = candidates.distribution()
            lmbda = knnlm.lmbda if proposal.lmbda is None else float(proposal.lmbda[0])
            mixed = (1 - lmbda) * logits[place].double().softmax(0)
            mixed[values] += lmbda * probabilities.double()
            result.append(mixed.log())
            outcome = count_votes(searched, given, knnlm.values, torch.tensor([token]), knnlm.inverse_temperatures)
            retriever.observe(step, outcome.matched)
        return torch.stack(result)
