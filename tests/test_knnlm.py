"""The retrieval step by hand on a datastore of four entries, and what eval_lm's flags make of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.errors import UserError
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.retrieval.clusters import Clusters, save_clusters
from fairseq.retrieval.parallel import STEP_COST, parts_of_like_length
from fairseq.retrieval.retrievers.knnlm import KNNLMRetriever
from fairseq.retrieval.retrievers.random_skip import RandomSkipRetriever
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever
from fairseq.retrieval.similarity import IndexSimilarity, KeySimilarity
from fairseq.scored_sequences import ScoredSequence

KEYS = np.array([[0, 0], [1, 0], [0, 2], [3, 3]], np.float32)
VALUES = np.array([7, 7, 9, 9])


def write_store(folder: Path, metric: int = faiss.METRIC_L2) -> None:
    KEYS.astype("<f4").tofile(folder / "store_keys.npy")
    VALUES.astype("<i8").tofile(folder / "store_vals.npy")
    index = faiss.IndexFlat(2, metric)
    index.add(KEYS)
    faiss.write_index(index, str(folder / "store.index"))


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """build(*flags, metric=...): a KNNLM over the four entries, from a command line."""

    def build(*flags: str, metric: int = faiss.METRIC_L2, width: int = 2) -> KNNLM:
        write_store(tmp_path, metric)
        files = ["--dstore-filename", str(tmp_path / "store"), "--indexfile", str(tmp_path / "store.index")]
        words = ["data", "--knnlm", *files, "--k", "3", "--lmbda", "0.25", *flags]
        return build_knnlm(options.parse_args_and_arch(options.get_eval_lm_parser(), words), width)

    return build


def sequence(*tokens: tuple[list[float], int], lm: float = 0.5) -> ScoredSequence:
    queries = torch.tensor([query for query, _ in tokens]).view(len(tokens), 2)
    targets = torch.tensor([target for _, target in tokens], dtype=torch.int64)
    return ScoredSequence(3, queries, targets, torch.full((len(tokens),), math.log(lm)))


def test_equations_by_hand(build: Any) -> None:
    """From the origin: distances 0, 1 and 4 to the nearest three, of which the first two are of word 7."""
    (result,) = build("--no-pointer").score([sequence(([0.0, 0.0], 7), ([0.0, 0.0], 9), ([0.0, 0.0], 5))])
    total = 1 + math.exp(-1) + math.exp(-4)
    for probability, knn in zip(result.log_probs.exp().tolist(), [(1 + math.exp(-1)) / total, math.exp(-4) / total, 0]):
        assert probability == pytest.approx(0.25 * knn + 0.75 * 0.5, rel=1e-5)
    assert result.knn_log_probs[2] == -10000
    assert (result.sample_id, result.candidates.tolist(), result.matched.tolist()) == (3, [3, 3, 3], [2, 1, 0])
    assert result.searched.all()


def test_temperature(build: Any) -> None:
    (result,) = build("--no-pointer", "--knn-temp", "2").score([sequence(([0.0, 0.0], 9))])
    knn = math.exp(-2) / (1 + math.exp(-0.5) + math.exp(-2))
    assert result.knn_log_probs.exp().item() == pytest.approx(knn, rel=1e-5)


def test_pointers_by_hand(build: Any) -> None:
    """The first token finds entries 0 and 1 right; their successors 1 and 2 are all that votes for the second."""
    (result,) = build().score([sequence(([0.0, 0.0], 7), ([0.0, 0.0], 9), ([0.0, 0.0], 9))])
    assert result.searched.tolist() == [True, False, False]
    assert result.candidates.tolist() == [3, 2, 1]
    knn = [math.exp(-4) / (math.exp(-1) + math.exp(-4)), 1]
    np.testing.assert_allclose(result.knn_log_probs[1:].exp(), knn, rtol=1e-5)


def test_last_entry_has_no_successor(build: Any) -> None:
    (result,) = build("--k", "1").score([sequence(([3.0, 3.0], 9), ([3.0, 3.0], 9))])
    assert result.searched.tolist() == [True, True]


def test_id_of_minus_one_reads_the_last_entry(build: Any) -> None:
    """Five neighbours of four: the fifth has the last entry's value, no weight, and entry 0 as its successor."""
    (result,) = build("--k", "5").score([sequence(([0.0, 0.0], 9), ([0.0, 0.0], 7))])
    assert result.candidates.tolist() == [5, 2]
    assert result.matched.tolist() == [3, 1]
    assert result.searched.tolist() == [True, False]


def test_nothing_to_score(build: Any) -> None:
    assert build().score([]) == []
    (result,) = build().score([sequence()])
    assert len(result.log_probs) == len(result.searched) == 0


def test_never_searching_leaves_the_share_of_the_language_model(build: Any) -> None:
    (result,) = build("--min-knns", "0").score([sequence(([0.0, 0.0], 7))])
    assert not result.searched.any()
    assert result.candidates.tolist() == [0]
    assert result.log_probs.item() == pytest.approx(math.log(0.75 * 0.5), rel=1e-6)


def test_skipped_tokens_are_the_language_model(build: Any) -> None:
    tokens = [([0.0, 0.0], 7)] * 50
    (result,) = build("--strategy", "random_skip", "--skip-probability", "0.5").score([sequence(*tokens)])
    assert 5 < result.searched.sum() < 45
    np.testing.assert_allclose(result.log_probs[~result.searched], math.log(0.5), rtol=1e-6)
    assert (result.log_probs[result.searched] > math.log(0.5)).all()


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        ([], RetomatonRetriever),
        (["--no-pointer"], KNNLMRetriever),
        (["--strategy", "random_skip"], RandomSkipRetriever),
        (["--strategy", "knnlm"], KNNLMRetriever),
    ],
)
def test_strategies(build: Any, flags: list[str], strategy: type) -> None:
    assert type(build(*flags).retriever) is strategy


def test_max_knns_is_k_unless_given(build: Any) -> None:
    assert build("--k", "2").retriever.automaton.max_knns == 2
    assert build("--k", "2", "--max-knns", "9").retriever.automaton.max_knns == 9


@pytest.mark.parametrize(
    ("flags", "similarity", "inner_product"),
    [
        ([], KeySimilarity, False),
        (["--knn-sim-func", "dot"], KeySimilarity, True),
        (["--knn-sim-func", "do_not_recomp_l2"], IndexSimilarity, None),
        (["--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"], IndexSimilarity, None),
    ],
)
def test_similarities(build: Any, flags: list[str], similarity: type, inner_product: bool | None) -> None:
    chosen = build(*flags).similarity
    assert type(chosen) is similarity
    assert inner_product is None or chosen.inner_product == inner_product


@pytest.mark.parametrize("flags", [[], ["--knn-sim-func", "dot"]])
def test_inner_product_index(build: Any, flags: list[str]) -> None:
    """The index's own products, or those recomputed from the keys: the same numbers for an exact index."""
    knnlm = build("--no-pointer", "--faiss-metric-type", "ip", *flags, metric=faiss.METRIC_INNER_PRODUCT)
    (result,) = knnlm.score([sequence(([1.0, 0.0], 9))])
    knn = math.exp(3) / (math.exp(3) + math.exp(1) + 1)  # the other entry of word 9 and one of word 7 tie at 0
    assert result.knn_log_probs.exp().item() in (
        pytest.approx(knn, rel=1e-5),
        pytest.approx((math.exp(3) + 1) / (math.exp(3) + math.exp(1) + 1), rel=1e-5),
    )


def test_members(build: Any, tmp_path: Path) -> None:
    """Entries 0 and 2 are one cluster, 1 and 3 another: the pointer to 1 brings 3 along, and itself again."""
    save_clusters(str(tmp_path / "members"), Clusters.from_assignment(np.array([0, 1, 0, 1])), {})
    knnlm = build("--members", str(tmp_path / "members"), "--k", "1", "--max-knns", "9")
    (result,) = knnlm.score([sequence(([0.0, 0.0], 7), ([0.0, 0.0], 7))])
    assert result.candidates.tolist() == [1, 3]
    knn = 2 * math.exp(-1) / (2 * math.exp(-1) + math.exp(-18))
    assert result.knn_log_probs[1].exp().item() == pytest.approx(knn, rel=1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def strolls(count: int, longest: int) -> list[ScoredSequence]:
    """Sequences of differing lengths, none of them alike."""
    rng = np.random.default_rng(5)
    places = [rng.integers(0, 4, rng.integers(0, longest)) for _ in range(count)]
    return [sequence(*[((KEYS[p] + rng.normal(0, 0.3, 2)).tolist(), int(VALUES[p])) for p in some]) for some in places]


@pytest.mark.parametrize("strategy", ["retomaton", "retomaton_chains"])
def test_threads_share_the_sequences_and_change_nothing(build: Any, threads: Any, strategy: str) -> None:
    knnlm, sequences = build("--strategy", strategy, "--min-knns", "2"), strolls(7, 30)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(knnlm.score(sequences))
        assert torch.get_num_threads() == count
    for alone, shared, scored in zip(*results, sequences, strict=True):
        assert len(shared.log_probs) == len(scored)
        assert 0 < alone.searched.sum() <= len(scored) or not len(scored)
        np.testing.assert_array_equal(alone.searched, shared.searched)
        np.testing.assert_array_equal(alone.candidates, shared.candidates)
        np.testing.assert_allclose(alone.log_probs, shared.log_probs, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[], [0, 0], [7], [3, 9, 1, 4, 4, 0, 8], [40, 1, 1, 1], [5] * 30])
@pytest.mark.parametrize("most", [1, 2, 5, 40])
def test_parts_cost_about_the_same(lengths: list[int], most: int) -> None:
    parts = parts_of_like_length(lengths, most)
    assert len(parts) <= most
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    shortest, longest = ([choose(lengths[i] for i in part) for part in parts] for choose in (min, max))
    assert all(before >= after for before, after in zip(shortest, longest[1:], strict=False))
    costs = [sum(lengths[i] for i in part) + STEP_COST * steps for part, steps in zip(parts, longest, strict=True)]
    one = (STEP_COST + 1) * max(lengths, default=0)  # the cost of the longest sequence alone
    assert max(costs, default=0) <= (sum(lengths) + STEP_COST * sum(longest)) / most + one


def test_a_failing_thread_stops_the_others(build: Any, threads: Any) -> None:
    threads(2)
    knnlm, sequences = build(), strolls(6, 2000)
    searches, search = [], knnlm.index.search

    def fails_at_third(queries: torch.Tensor, k: int) -> Any:
        searches.append(len(queries))
        if len(searches) >= 3:
            raise UserError("no more")
        return search(queries, k)

    knnlm.index.search = fails_at_third
    with pytest.raises(UserError, match="no more"):
        knnlm.score(sequences)
    assert len(searches) <= 4, "each thread fails at most once"


def test_wrong_width(build: Any) -> None:
    with pytest.raises(UserError, match="store"):
        build(width=3)


def test_not_a_number(build: Any) -> None:
    with pytest.raises(UserError, match="not a number"):
        build("--no-pointer").score([sequence(([math.nan, 0.0], 7))])


def test_flags_are_checked(build: Any) -> None:
    for flags in (["--k", "0"], ["--lmbda", "1.5"], ["--probe", "0"], ["--knn-sim-func", "cosine"]):
        with pytest.raises(UserError, match=flags[0]):
            build(*flags)
    with pytest.raises(UserError, match="--dstore-filename"):
        build_knnlm(argparse.Namespace(dstore_filename=None), 2)
