"""Retrieval one position at a time: the numbers of an evaluation, for hypotheses that are reordered, end and begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq import options
from fairseq.errors import UserError
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.retrieval.clusters import Clusters, save_clusters
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY, Proposal, Retriever, Step
from fairseq.retrieval_steps import RetrievalSteps
from fairseq.scored_sequences import ScoredSequence

SIZE, WIDTH, WORDS = 400, 4, 12
STRATEGIES = {
    "knnlm": ["--no-pointer"],
    "random_skip": ["--strategy", "random_skip"],
    "retomaton": [],
    "retomaton, searching more": ["--min-knns", "6"],
    "retomaton with clusters": ["--members"],
    "chains": ["--strategy", "retomaton_chains", "--members"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of 400 entries with few words, so that pointers survive, an index, and clusters of 20 entries."""
    folder, random = tmp_path_factory.mktemp("store"), np.random.default_rng(1)
    keys = random.standard_normal((SIZE, WIDTH)).astype("<f4")
    keys.tofile(folder / "store_keys.npy")
    random.integers(4, WORDS, SIZE).astype("<i8").tofile(folder / "store_vals.npy")
    index = faiss.IndexFlat(WIDTH, faiss.METRIC_L2)
    index.add(keys)
    faiss.write_index(index, str(folder / "store.index"))
    save_clusters(str(folder / "members"), Clusters.from_assignment(random.integers(0, 20, SIZE), 20), {})
    return folder


def opened(folder: Path, flags: Sequence[str], lmbda: float = 0.3) -> KNNLM:
    files = ["--dstore-filename", str(folder / "store"), "--indexfile", str(folder / "store.index")]
    members = [str(folder / "members")] if flags and flags[-1] == "--members" else []
    words = ["data", "--knnlm", *files, "--k", "8", "--lmbda", str(lmbda), *flags, *members]
    return build_knnlm(options.parse_args_and_arch(options.get_eval_lm_parser(), words), WIDTH)


def texts(lengths: Sequence[int], seed: int = 0) -> list[ScoredSequence]:
    random = torch.Generator().manual_seed(seed)
    return [
        ScoredSequence(
            number,
            torch.randn(length, WIDTH, generator=random),
            torch.randint(4, WORDS, (length,), generator=random),
            torch.full((length,), -math.log(WORDS)),
        )
        for number, length in enumerate(lengths)
    ]


def uniform(rows: int) -> Tensor:
    return torch.full((rows, WORDS), -math.log(WORDS))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_numbers_of_an_evaluation(folder: Path, name: str) -> None:
    """Prompts of unequal length are read, then positions are taken one by one: probabilities and searches agree."""
    knnlm = opened(folder, STRATEGIES[name])
    sequences = texts([9, 4, 12, 4])
    read = [5, 0, 8, 0]  # the prompts; four more tokens of each
    expected = knnlm.score(sequences)
    steps = RetrievalSteps(knnlm)
    steps.begin(
        [sequence.queries[:n] for sequence, n in zip(sequences, read)],
        [sequence.targets[:n] for sequence, n in zip(sequences, read)],
    )
    for place in range(4):
        at = [n + place for n in read]
        found = steps.retrieve(torch.stack([sequence.queries[i] for sequence, i in zip(sequences, at)]))
        mixed = found.mix(uniform(4))
        tokens = torch.stack([sequence.targets[i] for sequence, i in zip(sequences, at)])
        assert found.proposal.search.tolist() == [bool(result.searched[i]) for result, i in zip(expected, at)]
        torch.testing.assert_close(
            mixed.gather(1, tokens[:, None])[:, 0],
            torch.stack([result.log_probs[i] for result, i in zip(expected, at)]), atol=1e-5, rtol=0,
        )
        outcome = steps.observe(tokens)
        assert outcome.matches.tolist() == [int(result.matched[i]) for result, i in zip(expected, at)]
    if knnlm.retriever.sequential:
        assert steps.searches == sum(int(result.searched.sum()) for result in expected)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"random_skip"}))  # it draws by the number of the sample
def test_a_state_goes_with_its_hypothesis(folder: Path, name: str) -> None:
    """Hypotheses that are reordered, copied and dropped at every step have the numbers of texts read from the start."""
    knnlm, random = opened(folder, STRATEGIES[name]), np.random.default_rng(5)
    queries, tokens = [torch.zeros(0, WIDTH)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3
    steps = RetrievalSteps(knnlm)
    steps.begin(queries, tokens)
    for _ in range(10):
        new = torch.randn(len(queries), WIDTH)
        found = steps.retrieve(new)
        rows = torch.from_numpy(random.integers(0, len(queries), random.integers(1, 5)))
        chosen = torch.from_numpy(random.integers(4, WORDS, len(rows)))
        queries = [torch.cat([queries[row], new[row][None]]) for row in rows]
        tokens = [torch.cat([tokens[row], token[None]]) for row, token in zip(rows, chosen)]
        mixed = found.mix(uniform(len(new)))[rows, chosen]
        of_text = [ScoredSequence(0, q, t, torch.full((len(t),), -math.log(WORDS))) for q, t in zip(queries, tokens)]
        expected = torch.stack([result.log_probs[-1] for result in knnlm.score(of_text)])
        torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.of_rows(rows).mix(uniform(len(rows)))[range(len(rows)), chosen], mixed)
        steps.observe(chosen, rows)
        again = torch.from_numpy(random.permutation(len(queries)))
        steps.take_rows(again)  # also after the tokens are known
        queries, tokens = [queries[row] for row in again], [tokens[row] for row in again]


def test_a_mixture_is_a_distribution(folder: Path) -> None:
    steps = RetrievalSteps(opened(folder, []))
    steps.begin([torch.zeros(0, WIDTH)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    mixed = steps.retrieve(torch.randn(2, WIDTH)).mix(torch.randn(2, WORDS).log_softmax(1))
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(2))


def test_without_weight_the_model_is_alone(folder: Path) -> None:
    steps = RetrievalSteps(opened(folder, [], lmbda=0))
    steps.begin([torch.zeros(0, WIDTH)], [torch.zeros(0, dtype=torch.int64)])
    alone = torch.randn(1, WORDS).log_softmax(1)
    assert torch.equal(steps.retrieve(torch.randn(1, WIDTH)).mix(alone), alone)


def test_several_positions_at_once(folder: Path) -> None:
    """Without a state, the candidates of the next positions come from one search."""
    knnlm = opened(folder, STRATEGIES["random_skip"])
    (sequence,) = texts([7])
    (expected,) = knnlm.score([sequence])
    steps = RetrievalSteps(knnlm)
    steps.begin([sequence.queries[:2]], [sequence.targets[:2]])
    found = steps.retrieve_ahead(sequence.queries[2:])
    mixed = found.mix(uniform(5)).gather(1, sequence.targets[2:, None])[:, 0]
    torch.testing.assert_close(mixed, expected.log_probs[2:], atol=1e-5, rtol=0)
    assert found.proposal.search.tolist() == expected.searched[2:].tolist()


def test_rows_of_entries() -> None:
    entries = Entries(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([5, 6, 7, 8, 9]), torch.arange(5.0))
    taken = entries.of_rows(torch.tensor([2, -1, 0, 2, 1]))
    assert taken.rows.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert taken.ids.tolist() == [7, 8, 9, 5, 6, 7, 8, 9]
    assert taken.counts(5).tolist() == [3, 0, 2, 3, 0]
    for rows in ([], [-1], [3]):
        assert len(entries.of_rows(torch.tensor(rows, dtype=torch.int64))) == 0


def test_a_strategy_that_cannot_rearrange_says_so(folder: Path) -> None:
    class Fixed(Retriever):
        def propose(self, step: Step) -> Proposal:
            return Proposal(torch.ones(len(step), dtype=torch.bool))

    knnlm = opened(folder, [])
    knnlm.retriever = Fixed(knnlm.retriever.args, knnlm.retriever.resources)
    steps = RetrievalSteps(knnlm)
    with pytest.raises(UserError, match="Fixed, which has no take_rows"):
        steps.begin([torch.zeros(0, WIDTH)], [torch.zeros(0, dtype=torch.int64)])


def test_every_strategy_of_the_package_can() -> None:
    for name, cls in RETRIEVER_REGISTRY.items():
        if cls.sequential and cls.__module__.startswith("fairseq."):
            owner: Any = next(base for base in cls.__mro__ if "take_rows" in vars(base))
            assert owner is not Retriever, name
