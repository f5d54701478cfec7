"""The arguments and return values of strategies: `weigh`, and the checks of what strategies return."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.knnlm import KNNLM
from fairseq.retrieval import kernels
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.retrievers import Candidates, Proposal, Resources, Retriever, Step, Weights
from fairseq.retrieval.retrievers.checks import Checks, StrategyError, are_needed
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever
from fairseq.retrieval.similarity import IndexSimilarity
from fairseq.retrieval.voting import Searched
from fairseq.scored_sequences import ScoredSequence

SIZE, WIDTH, K = 300, 8, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Datastore, FaissIndex]:
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((SIZE, WIDTH), np.float32), rng.integers(0, 6, SIZE)
    index = faiss.IndexFlatL2(WIDTH)
    index.add(keys)
    faiss.write_index(index, str(folder / "index"))
    return Datastore("store", keys, values, WIDTH, {}), FaissIndex(str(folder / "index"), SIZE, 1)


def sequences(count: int = 3, length: int = 12) -> list[ScoredSequence]:
    rng = np.random.default_rng(1)
    return [
        ScoredSequence(
            number,
            torch.from_numpy(rng.standard_normal((length + number, WIDTH), np.float32)),
            torch.from_numpy(rng.integers(0, 6, length + number)),
            torch.full((length + number,), math.log(0.2)),
        )
        for number in range(count)
    ]


def score(store: tuple[Datastore, FaissIndex], strategy: type[Retriever], checked: bool = True, **flags: Any) -> Any:
    datastore, index = store
    args = argparse.Namespace(**{"min_knns": 4, "max_knns": None, **flags})
    retriever = strategy(args, Resources(SIZE, K, 0.25))
    checks = Checks("mine", SIZE) if checked else None
    return KNNLM(datastore, index, retriever, IndexSimilarity(index), K, 0.25, checks=checks).score(sequences())


def candidates(temperature: float = 2.0) -> Candidates:
    """Of a step of three tokens: the first is searched, the first and third have proposed entries."""
    searched = Searched(torch.tensor([0]), torch.tensor([[0, 1, -1]]), torch.tensor([[-1.0, -2.0, -math.inf]]))
    given = Entries(torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([-1.0, -8.0]), torch.tensor([3.0, 1.0]))
    return Candidates.of(3, searched, given, torch.tensor([7, 9, 9, 5]), temperature)


def test_candidates_are_what_was_found_and_what_was_given() -> None:
    seen = candidates()
    assert (seen.tokens, seen.found) == (3, 3)
    assert seen.rows.tolist() == [0, 0, 0, 0, 2]
    assert seen.ids.tolist() == [0, 1, -1, 2, 3]
    assert seen.values[[0, 1, 3, 4]].tolist() == [7, 9, 9, 5]
    assert seen.weights.tolist() == [1, 1, 1, 3, 1]


def test_shares_and_distribution_are_those_of_the_softmax() -> None:
    seen = candidates()
    mass = np.array([math.exp(-0.5), math.exp(-1), 0, 3 * math.exp(-0.5)])
    np.testing.assert_allclose(seen.shares()[:4], mass / mass.sum(), rtol=1e-6)
    rows, values, probabilities = seen.distribution()
    by_value = {(int(r), int(v)): float(p) for r, v, p in zip(rows, values, probabilities)}
    assert by_value[0, 7] == pytest.approx(mass[0] / mass.sum())
    assert by_value[0, 9] == pytest.approx((mass[1] + mass[3]) / mass.sum())
    assert by_value[2, 5] == pytest.approx(1)
    assert seen.sums(seen.shares()).tolist() == pytest.approx([1, 0, 1])
    assert seen.top_probability().tolist() == pytest.approx([by_value[0, 9], 0, 1])


def test_no_candidates_at_all() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Searched(nothing, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    seen = Candidates.of(2, empty, Entries(nothing, nothing, torch.zeros(0)), torch.tensor([7]), 1.0)
    assert seen.top_probability().tolist() == [0, 0]
    assert seen.largest(seen.scores).tolist() == [-math.inf, -math.inf]


class Halved(RetomatonRetriever):
    """Everything as RetoMaton, through `weigh`: every candidate votes half a time, which changes nothing."""

    def weigh(self, step: Step, candidates: Candidates) -> Weights:
        return Weights(votes=candidates.weights / 2)


class NearestOnly(RetomatonRetriever):
    """Only each token's best candidate votes, and lambda is its share of the mass."""

    def weigh(self, step: Step, candidates: Candidates) -> Weights:
        best = candidates.scores == candidates.largest(candidates.scores)[candidates.rows]
        return Weights(candidates.largest(candidates.shares()).clamp(0, 1), best.float())


@pytest.mark.parametrize("compiled", [True, False])
def test_equal_votes_change_nothing(store: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AVAILABLE", compiled and kernels.AVAILABLE)
    for plain, halved in zip(score(store, RetomatonRetriever), score(store, Halved)):
        np.testing.assert_allclose(plain.log_probs, halved.log_probs, atol=1e-6)
        assert (plain.searched == halved.searched).all() and (plain.matched == halved.matched).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_votes_and_lambda_of_weigh_are_used(store: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """p_kNN is 1 or (as in the original) e^-10000 where one candidate has all votes; ties would share."""
    monkeypatch.setattr(kernels, "AVAILABLE", compiled and kernels.AVAILABLE)
    results = score(store, NearestOnly)
    for result in results:
        knn = result.knn_log_probs.numpy()
        assert (np.isclose(knn, 0, atol=1e-6) | (knn < -9999) | np.isinf(knn)).all()
        assert np.isclose(knn, 0, atol=1e-6).any()
        assert (result.lmbda != 0.25).all() and ((result.lmbda > 0) & (result.lmbda <= 1)).all()
        lmbda = result.lmbda.double().numpy()
        mixed = np.logaddexp(np.log1p(-lmbda) + math.log(0.2), np.log(lmbda) + knn)
        np.testing.assert_allclose(result.log_probs, mixed, atol=1e-4)


def test_a_step_does_not_hold_the_right_token() -> None:
    assert set(Step.__dataclass_fields__) == {"sample_ids", "positions", "queries", "features"}


def bad(change: Callable[[Proposal], Any]) -> type[Retriever]:
    class Bad(RetomatonRetriever):
        def propose(self, step: Step) -> Any:
            proposal = super().propose(step)
            entries = Entries(torch.arange(len(step)), torch.full((len(step),), 3))
            return change(replace(proposal, entries=entries, search=torch.ones(len(step), dtype=torch.bool)))

    return Bad


def changed(**fields: Callable[[Any], Any]) -> Callable[[Proposal], Proposal]:
    """A change of the entries of a proposal."""

    def change(proposal: Proposal) -> Proposal:
        assert proposal.entries is not None
        values = {name: do(getattr(proposal.entries, name)) for name, do in fields.items()}
        return replace(proposal, entries=replace(proposal.entries, **values))

    return change


MISTAKES: dict[str, tuple[Callable[[Proposal], Any], str]] = {
    "nothing": (lambda p: None, "a NoneType, expected a Proposal"),
    "a float search": (lambda p: replace(p, search=p.search.float()), "search as float32"),
    "an array": (lambda p: replace(p, search=p.search.numpy()), "search of type ndarray"),
    "a short search": (lambda p: replace(p, search=p.search[1:]), "search as bool of shape"),
    "a wide search": (lambda p: replace(p, search=p.search[:, None]), "search as bool of shape"),
    "a pair": (lambda p: replace(p, entries=(p.entries.rows, p.entries.ids)), "entries of type tuple"),  # type: ignore
    "a large id": (changed(ids=lambda ids: ids + SIZE), "entries.ids from 303 to 303"),
    "an id of -1": (changed(ids=lambda ids: -torch.ones_like(ids)), "entries.ids from -1 to -1"),
    "int32 ids": (changed(ids=lambda ids: ids.int()), "entries.ids as int32"),
    "float ids": (changed(ids=lambda ids: ids.float()), "entries.ids as float32"),
    "fewer rows": (changed(rows=lambda rows: rows[1:]), "entries.rows as int64 of shape"),
    "rows outside": (changed(rows=lambda rows: rows + 1), "entries.rows from 1 to"),
    "unsorted rows": (changed(rows=lambda rows: rows.flip(0)), "rows in ascending order"),
    "negative rows": (changed(rows=lambda rows: rows - 1), "entries.rows from -1 to"),
    "negative votes": (changed(weights=lambda _: torch.full((3,), -1.0)), "entries.weights with -1"),
    "endless votes": (changed(weights=lambda _: torch.full((3,), math.inf)), "entries.weights with inf"),
    "few votes": (changed(weights=lambda _: torch.ones(1)), "entries.weights as float32 of shape"),
    "wrong bounds": (changed(bounds=lambda _: torch.tensor([0, 0, 0, 3])), "entries.bounds that do not fit"),
    "a large lambda": (lambda p: replace(p, lmbda=torch.full((3,), 1.7)), "a lmbda of 1.7"),
    "a negative lambda": (lambda p: replace(p, lmbda=torch.full((3,), -0.1)), "a lmbda of -0.1"),
    "lambda not a number": (lambda p: replace(p, lmbda=torch.full((3,), math.nan)), "a lmbda of nan"),
    "one lambda": (lambda p: replace(p, lmbda=0.3), "lmbda of type float"),
    "integer lambda": (lambda p: replace(p, lmbda=torch.ones(3).long()), "lmbda as int64"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_propose_are_named(store: Any, name: str) -> None:
    change, said = MISTAKES[name]
    with pytest.raises(StrategyError, match="--strategy mine: propose returned ") as raised:
        score(store, bad(change))
    assert said in str(raised.value) and "expected" in str(raised.value)


def weighing(returned: Callable[[Candidates], Any]) -> type[Retriever]:
    class Bad(RetomatonRetriever):
        def weigh(self, step: Step, candidates: Candidates) -> Any:
            return returned(candidates)

    return Bad


WEIGH_MISTAKES: dict[str, tuple[Callable[[Candidates], Any], str]] = {
    "a tensor": (lambda c: c.weights, "a Tensor, expected Weights or None"),
    "few votes": (lambda c: Weights(votes=c.weights[1:]), "votes as float32 of shape"),
    "double votes": (lambda c: Weights(votes=c.weights.double()), "votes as float64"),
    "negative votes": (lambda c: Weights(votes=-c.weights), "votes with -1"),
    "no numbers": (lambda c: Weights(votes=c.weights * math.nan), "votes with nan"),
    "lambda": (lambda c: Weights(lmbda=torch.full((c.tokens,), 2.0)), "a lmbda of 2"),
    "lambda of candidates": (lambda c: Weights(lmbda=c.shares()), "lmbda as float32 of shape"),
}


@pytest.mark.parametrize("name", WEIGH_MISTAKES)
def test_mistakes_of_weigh_are_named(store: Any, name: str) -> None:
    returned, said = WEIGH_MISTAKES[name]
    with pytest.raises(StrategyError, match="--strategy mine: weigh returned ") as raised:
        score(store, weighing(returned))
    assert said in str(raised.value)


def test_who_is_checked() -> None:
    resources = Resources(SIZE, K, 0.25)
    own, of_others = (cls(argparse.Namespace(max_knns=3), resources) for cls in (RetomatonRetriever, Halved))
    assert [are_needed(own, choice) for choice in ("auto", "always", "never")] == [False, True, False]
    assert [are_needed(of_others, choice) for choice in ("auto", "always", "never")] == [True, True, False]
