"""Random skipping: evenly distributed, the same whatever the batching, another with another seed."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY, Resources, Step, register_retriever
from fairseq.retrieval.retrievers.random_skip import uniform


def coordinates(samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(samples).repeat_interleave(length)
    return ids, torch.arange(length).repeat(samples)


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_uniform(seed: int) -> None:
    """200,000 numbers: mean, variance and every tenth of the range within 5 standard errors; neighbours unrelated."""
    numbers = uniform(*coordinates(400, 500), seed).numpy()
    count = len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * np.sqrt(1 / 12 / count)
    tenths = np.bincount((numbers * 10).astype(int), minlength=10) / count
    assert np.abs(tenths - 0.1).max() < 5 * np.sqrt(0.09 / count)
    grid = numbers.reshape(400, 500)
    for first, second in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:]), (grid[:-1, :-1], grid[1:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / np.sqrt(count)
    assert len(np.unique(numbers)) == count


def test_depends_on_sample_position_and_seed_only() -> None:
    ids, positions = coordinates(20, 30)
    numbers = uniform(ids, positions, 1)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(uniform(ids[order], positions[order], 1), numbers[order], rtol=0, atol=0)
    torch.testing.assert_close(uniform(ids[:7], positions[:7], 1), numbers[:7], rtol=0, atol=0)
    assert (uniform(ids, positions, 2) != numbers).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_proposal(share: float) -> None:
    """A skipped token is left to the language model: no search, and no weight for retrieval."""
    args = argparse.Namespace(skip_probability=share, seed=1)
    retriever = RETRIEVER_REGISTRY["random_skip"](args, Resources(100, 8, 0.25))
    ids, positions = coordinates(100, 100)
    count = len(ids)
    proposal = retriever.propose(Step(ids, positions, torch.zeros(count, 4)))
    assert abs(1 - proposal.search.double().mean() - share) < 5 * np.sqrt(0.25 / count)
    assert proposal.entries is None
    assert proposal.lmbda is not None
    torch.testing.assert_close(proposal.lmbda, torch.where(proposal.search, 0.25, 0.0))


def test_registry() -> None:
    assert {"knnlm", "retomaton", "random_skip"} <= set(RETRIEVER_REGISTRY)
    with pytest.raises(ValueError, match="cannot register knnlm for --strategy twice"):
        register_retriever("knnlm")(RETRIEVER_REGISTRY["knnlm"])
    with pytest.raises(ValueError, match="must extend Retriever"):
        register_retriever("nothing")(dict)
    assert "nothing" not in RETRIEVER_REGISTRY
