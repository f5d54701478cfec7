"""Retrieval of many sequences together against a plain sequential implementation, written only from the paper and the
published description: one sequence, one token, one candidate list at a time, in NumPy and float64. Random small
datastores without ties (but with duplicate candidates) and with mostly ties, clusters of very unequal sizes that miss
some entries, every kind of limit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq.knnlm import KNNLM, RetrievalResult
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY, Resources
from fairseq.retrieval.similarity import IndexSimilarity, KeySimilarity
from fairseq.scored_sequences import ScoredSequence

DIMENSION = 8
WORDS = 5
NEVER_MORE = 9_999_999


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@dataclass
class Rules:
    """The flags that decide about candidates."""

    k: int = 8
    min_knns: int = 1
    max_knns: int = 8
    pointers: bool = True
    lmbda: float = 0.25
    temperature: float = 1.0


@dataclass
class Outcome:
    """Per token of one sequence."""

    log_probs: list[float]
    searched: list[bool]
    candidates: list[int]
    matched: list[int]


def sequential(
    queries: np.ndarray,
    targets: np.ndarray,
    lm_log_probs: np.ndarray,
    values: np.ndarray,
    members: scipy.sparse.csr_matrix | None,
    search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rules: Rules,
) -> Outcome:
    """RetoMaton for one sequence. search(query, k) gives (scores, ids), score(query, ids) scores; larger is nearer."""
    cluster_of = np.zeros(len(values), np.int64)
    if members is not None:
        for cluster in range(members.shape[0]):
            cluster_of[members[cluster].indices] = cluster
    outcome = Outcome([], [], [], [])
    survivors: list[tuple[float, int]] = []
    for query, target, lm_log_prob in zip(queries, targets, lm_log_probs, strict=True):
        # The published program's own sort, of float32 and not stable, which decides the order of ties.
        best_first = np.array([score for score, _ in survivors], np.float32).argsort()[::-1]
        pointed = [survivors[place][1] + 1 for place in best_first] if rules.pointers else []
        searching = not rules.pointers or len(survivors) < rules.min_knns
        if len(pointed) >= rules.max_knns:
            pointed = pointed[: rules.max_knns]
        elif pointed and members is not None:
            clusters, counts = np.unique(cluster_of[pointed], return_counts=True)
            for cluster in clusters[np.argsort(-counts)]:
                pointed += sorted(members[cluster].indices.tolist())
            pointed = pointed[: rules.max_knns]
        scores, ids = np.zeros(0), np.zeros(0, np.int64)
        if searching:
            scores, ids = search(query, rules.k)
        if pointed:
            ids = np.concatenate([ids, pointed])
            scores = np.concatenate([scores, score(query, np.array(pointed))])
        right = values[ids] == target  # an id of -1 is the last entry, as Python counts
        knn = knn_log_prob(scores / rules.temperature, right)
        with np.errstate(divide="ignore"):
            mixture = np.logaddexp(np.log1p(-rules.lmbda) + lm_log_prob, np.log(rules.lmbda) + knn)
        outcome.log_probs.append(float(mixture))
        outcome.searched.append(searching)
        outcome.candidates.append(len(ids))
        outcome.matched.append(int(right.sum()))
        last = len(values) - 1
        survivors = [(float(s), int(i)) for s, i in zip(scores[right], ids[right], strict=True) if i < last]
    return outcome


def knn_log_prob(scores: np.ndarray, right: np.ndarray) -> float:
    """log of the share of exp(score) that belongs to right entries; wrong ones count with a weight of exp(-10000)."""
    if not len(scores):
        return -math.inf
    shares = scores - log_sum_exp(scores)
    return log_sum_exp(np.where(right, shares, shares - 10000.0))


def log_sum_exp(terms: np.ndarray) -> float:
    """In float64, shifted by the largest term."""
    return float(terms.max() + np.log(np.exp(terms - terms.max()).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Small worlds


class ExactIndex:
    """Brute force over the keys, with FAISS's conventions: ids of -1 at a huge distance where there are too few."""

    inner_product = False

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = torch.from_numpy(keys)
        self.size, self.dimension = keys.shape

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        squared = (queries[:, None] - self.keys).square().sum(2)
        nearest, ids = squared.sort(dim=1, stable=True)
        missing = max(0, k - self.size)
        nearest = torch.nn.functional.pad(nearest[:, :k], (0, missing), value=torch.finfo(torch.float32).max)
        return nearest, torch.nn.functional.pad(ids[:, :k], (0, missing), value=-1)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        return (queries[rows] - self.keys[ids]).square().sum(1)


@dataclass
class World:
    """A datastore, its clusters and some sequences to score."""

    keys: np.ndarray
    values: np.ndarray
    members: scipy.sparse.csr_matrix | None
    sequences: list[ScoredSequence]

    @property
    def datastore(self) -> Datastore:
        return Datastore("memory", self.keys, self.values, DIMENSION, {})

    @property
    def clusters(self) -> Clusters | None:
        return None if self.members is None else Clusters.from_csr(self.members, len(self.values), "memory")


def make_world(
    seed: int,
    entries: int,
    lengths: list[int],
    clustered: bool,
    keys: np.ndarray | None = None,
    words: int = WORDS,
    whole: bool = False,
) -> World:
    """Random keys, values that repeat like text does, queries near keys so that chains of pointers come about.

    whole: queries differ from keys by whole numbers."""
    rng = np.random.default_rng(seed)
    if keys is None:
        keys = rng.standard_normal((entries, DIMENSION)).astype(np.float32)
    entries = len(keys)
    values = rng.integers(0, words, entries)
    members = None
    if clustered:
        cluster_of = np.minimum(rng.geometric(0.4, entries) - 1, 6)  # half of all in the first cluster
        listed = np.flatnonzero(rng.random(entries) < 0.85)
        ones = np.ones(len(listed), np.int64)
        members = scipy.sparse.csr_matrix((ones, (cluster_of[listed], listed)), shape=(8, entries))
    sequences = []
    for number, length in enumerate(lengths):
        start = int(rng.integers(0, entries))
        along = (start + np.arange(length)) % entries
        noise = 0.3 * rng.standard_normal((length, DIMENSION))
        queries = (keys[along] + (np.rint(noise) if whole else noise)).astype(np.float32)
        targets = np.where(rng.random(length) < 0.7, values[along], rng.integers(0, words, length))
        lm_log_probs = np.log(rng.random(length).astype(np.float32) * 0.9 + 0.05)
        sequences.append(ScoredSequence(number, *map(torch.from_numpy, (queries, targets, lm_log_probs))))
    return World(keys, values, members, sequences)


def make_knnlm(world: World, index: Any, rules: Rules, from_keys: bool = False) -> KNNLM:
    """The lock-step implementation under the same rules."""
    name = "retomaton" if rules.pointers else "knnlm"
    args = argparse.Namespace(min_knns=rules.min_knns, max_knns=rules.max_knns, seed=1)
    similarity = KeySimilarity(world.datastore, False) if from_keys else IndexSimilarity(index)
    resources = Resources(len(world.values), rules.k, rules.lmbda, world.clusters, similarity=similarity)
    retriever = RETRIEVER_REGISTRY[name](args, resources)
    return KNNLM(world.datastore, index, retriever, similarity, rules.k, rules.lmbda, rules.temperature)


def compare(world: World, results: list[RetrievalResult], search: Any, score: Any, rules: Rules) -> None:
    """Every sequence's results against the reference's."""
    assert [result.sample_id for result in results] == [sequence.sample_id for sequence in world.sequences]
    for sequence, result in zip(world.sequences, results, strict=True):
        arrays = (sequence.queries.numpy(), sequence.targets.numpy(), sequence.lm_log_probs.numpy().astype(np.float64))
        expected = sequential(*arrays, world.values, world.members, search, score, rules)
        np.testing.assert_array_equal(result.searched, np.array(expected.searched, bool))
        np.testing.assert_array_equal(result.candidates, np.array(expected.candidates, np.int64))
        np.testing.assert_array_equal(result.matched, np.array(expected.matched, np.int64))
        np.testing.assert_allclose(result.log_probs, np.array(expected.log_probs), rtol=1e-5, atol=1e-4)


def exact_functions(keys: np.ndarray) -> tuple[Any, Any]:
    """search and score for the reference, over the keys."""

    def score(query: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return -((query.astype(np.float64) - keys[ids]) ** 2).sum(1)

    def search(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = score(query, np.arange(len(keys)))
        ids = np.argsort(-scores, kind="stable")[:k]
        missing = k - len(ids)
        filler = np.full(missing, -float(np.finfo(np.float32).max))
        return np.concatenate([scores[ids], filler]), np.concatenate([ids, np.full(missing, -1)])

    return search, score


RULES = st.builds(
    Rules,
    k=st.sampled_from([1, 3, 8, 64]),
    min_knns=st.sampled_from([0, 1, 5, NEVER_MORE]),
    max_knns=st.sampled_from([1, 2, 3, 7, 30, 1000]),
    pointers=st.sampled_from([True, True, True, False]),
    lmbda=st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    temperature=st.sampled_from([1.0, 10.0, 0.5]),
)
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 5, 13, 30]), min_size=1, max_size=6)


# ---------------------------------------------------------------------------------------------------------------------
# The tests


pytestmark = pytest.mark.usefixtures("compiled_and_arrays")


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), entries=st.integers(2, 60), lengths=LENGTHS, clustered=st.booleans(), rules=RULES)
@example(seed=1, entries=2, lengths=[0], clustered=True, rules=Rules())
@example(seed=2, entries=40, lengths=[30] * 5, clustered=True, rules=Rules(min_knns=5, max_knns=3))
def test_exact_search(seed: int, entries: int, lengths: list[int], clustered: bool, rules: Rules) -> None:
    world = make_world(seed, entries, lengths, clustered)
    results = make_knnlm(world, ExactIndex(world.keys), rules).score(world.sequences)
    compare(world, results, *exact_functions(world.keys), rules)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), entries=st.integers(2, 60), lengths=LENGTHS, clustered=st.booleans(), rules=RULES)
def test_distances_from_keys(seed: int, entries: int, lengths: list[int], clustered: bool, rules: Rules) -> None:
    """Scores recomputed from the keys. An id of -1 does not vote; in the original it has the last key's distance."""
    world = make_world(seed, entries, lengths, clustered)
    results = make_knnlm(world, ExactIndex(world.keys), rules, from_keys=True).score(world.sequences)
    search, score = exact_functions(world.keys)

    def recomputing(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found, ids = search(query, k)
        return np.where(ids < 0, found, score(query, ids)), ids

    compare(world, results, recomputing, score, rules)


TIED_RULES = st.builds(
    Rules,
    k=st.sampled_from([1, 8, 64, 300]),
    min_knns=st.sampled_from([1, 1, 5, 50, NEVER_MORE]),
    max_knns=st.sampled_from([1, 2, 7, 30, 100, 300, 1000]),
)
TIED_LENGTHS = st.lists(st.sampled_from([1, 2, 13, 30]), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    entries=st.sampled_from([3, 20, 100, 600]),
    kinds=st.sampled_from([1, 2, 3]),
    lengths=TIED_LENGTHS,
    words=st.integers(1, 3),
    clustered=st.booleans(),
    from_keys=st.booleans(),
    rules=TIED_RULES,
)
@example(
    seed=2, entries=600, kinds=3, lengths=[30] * 3, words=1, clustered=False, from_keys=False,
    rules=Rules(k=300, max_knns=300),
)  # fmt: skip
def test_ties(
    seed: int,
    entries: int,
    kinds: int,
    lengths: list[int],
    words: int,
    clustered: bool,
    from_keys: bool,
    rules: Rules,
) -> None:
    """Keys and queries of few whole numbers: distances are computed without rounding, and most of them are equal. Which
    entries stay where pointers are cut then depends on numpy's sort at each step before."""
    keys = np.random.default_rng(seed).integers(0, kinds, (entries, DIMENSION)).astype(np.float32)
    world = make_world(seed, entries, lengths, clustered, keys, words, whole=True)
    results = make_knnlm(world, ExactIndex(keys), rules, from_keys).score(world.sequences)
    search, score = exact_functions(keys)

    def recomputing(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found, ids = search(query, k)
        return np.where(ids < 0, found, score(query, ids)), ids

    compare(world, results, recomputing if from_keys else search, score, rules)


def write_index(keys: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of an IVFPQ index of the keys."""
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(DIMENSION), DIMENSION, 12, 4, 8)
    index.train(keys)
    index.add_with_ids(keys, np.arange(len(keys)))
    path = str(Path(tmp_path_factory.mktemp("ivfpq")) / "knn.index")
    faiss.write_index(index, path)
    return path


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, str]:
    """Keys and the file of their IVFPQ index, a twelfth of the lists nearly empty."""
    keys = np.random.default_rng(5).standard_normal((400, DIMENSION)).astype(np.float32)
    return keys, write_index(keys, tmp_path_factory)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    probe=st.sampled_from([1, 2, 12]),
    lengths=LENGTHS,
    clustered=st.booleans(),
    rules=RULES,
)
def test_quantised_search(
    seed: int, probe: int, lengths: list[int], clustered: bool, rules: Rules, quantised: tuple[np.ndarray, str]
) -> None:
    """IVFPQ: pointers are measured with the code table here, by rebuilding each vector in the reference. With one
    probed list and k of 64, searches come back with ids of -1."""
    keys, path = quantised
    world = make_world(seed, len(keys), lengths, clustered, keys)
    index = FaissIndex(path, len(keys), probe)
    results = make_knnlm(world, index, rules).score(world.sequences)
    plain = faiss.read_index(path)
    plain.nprobe = probe
    plain.make_direct_map()

    def search(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances, ids = plain.search(query[None], k)
        return -distances[0].astype(np.float64), ids[0]

    def score(query: np.ndarray, ids: np.ndarray) -> np.ndarray:
        vectors = np.stack([plain.reconstruct(int(entry)) for entry in ids])
        return -((query - vectors).astype(np.float64) ** 2).sum(1)

    compare(world, results, search, score, rules)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, str]:
    """Keys of which each occurs about six times, and the file of their IVFPQ index."""
    rng = np.random.default_rng(6)
    keys = rng.standard_normal((100, DIMENSION)).astype(np.float32)[rng.integers(0, 100, 600)]
    return keys, write_index(keys, tmp_path_factory)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), lengths=TIED_LENGTHS, clustered=st.booleans(), rules=TIED_RULES)
def test_quantised_ties(
    seed: int, lengths: list[int], clustered: bool, rules: Rules, repetitive: tuple[np.ndarray, str]
) -> None:
    """Entries with equal codes, found by a search and followed by pointers: the search's distances and those of rebuilt
    entries, as torch adds them up, differ in the last bits, which decide between copies."""
    keys, path = repetitive
    world = make_world(seed, len(keys), lengths, clustered, keys, words=2)
    results = make_knnlm(world, FaissIndex(path, len(keys), 4), rules).score(world.sequences)
    plain = faiss.read_index(path)
    plain.nprobe = 4
    plain.make_direct_map()

    def search(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances, ids = plain.search(query[None], k)
        return -distances[0].astype(np.float64), ids[0]

    def score(query: np.ndarray, ids: np.ndarray) -> np.ndarray:
        vectors = torch.from_numpy(np.stack([plain.reconstruct(int(entry)) for entry in ids]))
        return -(torch.from_numpy(query) - vectors).square().sum(1).numpy().astype(np.float64)

    compare(world, results, search, score, rules)


def test_search_finds_too_few(quantised: tuple[np.ndarray, str]) -> None:
    """The case above is not empty: ids of -1 do occur."""
    keys, path = quantised
    ids = FaissIndex(path, len(keys), 1).search(torch.from_numpy(keys[:5]), 64)[1]
    assert (ids == -1).any()
    assert (ids >= 0).any()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), lengths=LENGTHS, clustered=st.booleans(), rules=RULES, cuts=st.integers(0, 31))
def test_grouping(seed: int, lengths: list[int], clustered: bool, rules: Rules, cuts: int) -> None:
    """Sequences scored together or in any groups: the same searches, candidates and (to rounding) log-probabilities."""
    world = make_world(seed, 50, lengths, clustered)
    together = make_knnlm(world, ExactIndex(world.keys), rules).score(world.sequences)
    knnlm = make_knnlm(world, ExactIndex(world.keys), rules)
    apart: list[RetrievalResult] = []
    group: list[ScoredSequence] = []
    for number, sequence in enumerate(world.sequences):
        group.append(sequence)
        if cuts >> number & 1 or number == len(world.sequences) - 1:
            apart += knnlm.score(group)
            group = []
    for one, other in zip(together, apart, strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.searched, other.searched)
        np.testing.assert_array_equal(one.candidates, other.candidates)
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=2e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), rules=RULES, clustered=st.booleans(), length=st.integers(1, 12))
def test_probabilities_sum_to_one(seed: int, rules: Rules, clustered: bool, length: int) -> None:
    """Over all possible next words, for any prefix."""
    if rules.min_knns == 0 and rules.pointers:
        return  # no candidate ever: only the share of the LM is left, by the published rule
    world = make_world(seed, 50, [length], clustered)
    (sequence,) = world.sequences
    lm = torch.log_softmax(torch.randn(WORDS, generator=torch.Generator().manual_seed(seed)), 0)
    total = 0.0
    for word in range(WORDS):
        targets, lm_log_probs = sequence.targets.clone(), sequence.lm_log_probs.clone()
        targets[-1], lm_log_probs[-1] = word, lm[word]
        result = make_knnlm(world, ExactIndex(world.keys), rules).score(
            [ScoredSequence(0, sequence.queries, targets, lm_log_probs)]
        )
        total += math.exp(float(result[0].log_probs[-1]))
    assert total == pytest.approx(1.0, abs=2e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rules=RULES, lengths=LENGTHS)
def test_lambda_zero_is_the_language_model(seed: int, rules: Rules, lengths: list[int]) -> None:
    rules.lmbda = 0.0
    world = make_world(seed, 50, lengths, True)
    results = make_knnlm(world, ExactIndex(world.keys), rules).score(world.sequences)
    for result, sequence in zip(results, world.sequences, strict=True):
        np.testing.assert_array_equal(result.log_probs, sequence.lm_log_probs)


def test_always_search_without_pointers_is_knnlm() -> None:
    """A first token has no pointers; so RetoMaton on sequences of one token is kNN-LM."""
    world = make_world(3, 50, [1] * 40, True)
    always = make_knnlm(world, ExactIndex(world.keys), Rules(min_knns=NEVER_MORE)).score(world.sequences)
    knnlm = make_knnlm(world, ExactIndex(world.keys), Rules(pointers=False)).score(world.sequences)
    for one, other in zip(always, knnlm, strict=True):
        assert one.searched.all() and other.searched.all()
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=1e-6)


def test_chains_gain_a_copy_each_step() -> None:
    """Searching always, an entry on a matching chain of m tokens counts m + 1 times: quirk Q2, the bonus of long
    matches. All values are equal, so everything matches and all candidates are kept."""
    keys = np.eye(6, DIMENSION, dtype=np.float32) * 10
    values = np.zeros(6, np.int64)
    sequence = ScoredSequence(0, torch.from_numpy(keys[:5]), torch.zeros(5, dtype=torch.int64), torch.full((5,), -1.0))
    world = World(keys, values, None, [sequence])
    (result,) = make_knnlm(world, ExactIndex(keys), Rules(k=1, min_knns=NEVER_MORE, max_knns=100)).score([sequence])
    np.testing.assert_array_equal(result.candidates, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(result.matched, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(result.knn_log_probs, np.zeros(5), atol=1e-6)
