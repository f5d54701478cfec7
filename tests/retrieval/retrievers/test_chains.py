"""The strategy of chains against a plain loop: one sequence, one token, one dictionary of chains at a time."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.flag_types import natural_float
from fairseq.knnlm import KNNLM
from fairseq.retrieval import kernels
from fairseq.retrieval.clusters import Clusters
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.retrievers import Resources
from fairseq.retrieval.retrievers.chains import ChainsRetriever
from fairseq.retrieval.similarity import IndexSimilarity
from fairseq.scored_sequences import ScoredSequence

WIDTH = 4


def plain(
    sequence: ScoredSequence, keys: np.ndarray, values: np.ndarray, clusters: Clusters | None, args: argparse.Namespace
) -> tuple[list[float], list[bool]]:
    """log p and whether searched, per token; every distance computed, everything in Python."""
    chains: dict[int, int] = {}  # pointer -> length of its chain
    log_probs, searched = [], []
    for query, target, lm in zip(
        sequence.queries.double().numpy(), sequence.targets.tolist(), sequence.lm_log_probs.tolist()
    ):
        distance = ((keys - query) ** 2).sum(1)
        search = len(chains) < args.min_knns
        if len(chains) > args.pool:
            best = sorted(chains, key=lambda entry: (-chains[entry], entry))[: args.pool]
            chains = {entry: chains[entry] for entry in sorted(best)}
        votes = [(entry, (1 + length) ** args.chain_power) for entry, length in sorted(chains.items())]
        if clusters is not None:
            states = [int(clusters.cluster_of[entry]) for entry in chains]
            members = [
                member
                for state in sorted(set(states), key=lambda state: (-states.count(state), state))
                for member in clusters.members[clusters.indptr[state] : clusters.indptr[state + 1]].tolist()
            ]
            votes += [(member, 1) for member in members[: args.pool - len(chains)]]
        if search:
            votes += [(entry, 1) for entry in np.argsort(distance)[: args.k].tolist()]
        total = sum(weight * math.exp(-distance[entry]) for entry, weight in votes)
        right = sum(weight * math.exp(-distance[entry]) for entry, weight in votes if values[entry] == target)
        odds = args.lmbda / (1 - args.lmbda) * ((1 + max(chains.values(), default=0)) / 2) ** args.chain_trust
        lmbda = odds / (1 + odds)
        log_probs.append(math.log((1 - lmbda) * math.exp(lm) + lmbda * right / total))
        searched.append(search)
        last = len(keys) - 1
        kept = {entry for entry, _ in votes if values[entry] == target and entry != last}
        chains = {entry + 1: 1 + chains.get(entry, 0) for entry in kept}
    return log_probs, searched


def build(
    folder: Path, keys: np.ndarray, values: np.ndarray, clusters: Clusters | None, args: argparse.Namespace
) -> KNNLM:
    index = faiss.IndexFlatL2(WIDTH)
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(folder / "i"))
    opened = FaissIndex(str(folder / "i"), len(values))
    datastore = Datastore("none", None, values, WIDTH, {})
    retriever = ChainsRetriever(args, Resources(len(values), args.k, args.lmbda, clusters))
    return KNNLM(datastore, opened, retriever, IndexSimilarity(opened), args.k, args.lmbda)


@pytest.mark.parametrize("compiled", [False, True])
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 5, 9_999_999]),
    st.sampled_from([3, 8, 200]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 4.0]),
)
@settings(max_examples=25)
def test_against_the_loop(
    tmp_path_factory: pytest.TempPathFactory,
    compiled: bool,
    seed: int,
    min_knns: int,
    pool: int,
    grouped: bool,
    power: float,
) -> None:
    if compiled and not kernels.AVAILABLE:
        pytest.skip("numba is not installed")
    generator = np.random.default_rng(seed)
    size = int(generator.integers(3, 80))
    keys = generator.normal(size=(size, WIDTH)).astype(np.float32)
    values = generator.integers(0, 4, size)
    # clusters only where all members fit: which of equally voted clusters is cut depends on numpy's sort
    clusters = Clusters.from_assignment(generator.integers(0, 6, size)) if grouped and pool == 200 else None
    args = argparse.Namespace(k=5, lmbda=0.3, min_knns=min_knns, pool=pool, chain_power=power, chain_trust=0.8)
    args.k = min(args.k, size)
    lengths = generator.integers(1, 12, 3)
    sequences = [
        ScoredSequence(
            number,
            torch.from_numpy(generator.normal(size=(length, WIDTH)).astype(np.float32)),
            torch.from_numpy(generator.integers(0, 4, length)),
            torch.from_numpy(-generator.random(length).astype(np.float32)),
        )
        for number, length in enumerate(lengths.tolist())
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "AVAILABLE", compiled)
        results = build(tmp_path_factory.mktemp("i"), keys, values, clusters, args).score(sequences)
    for sequence, result in zip(sequences, results):
        log_probs, searched = plain(sequence, keys.astype(np.float64), values, clusters, args)
        assert result.searched.tolist() == searched
        np.testing.assert_allclose(result.log_probs, log_probs, rtol=2e-4, atol=2e-5)


def test_a_text_that_is_in_the_datastore_wins(tmp_path: Path) -> None:
    """One text has agreed for six tokens, and outvotes an entry that is nearer."""
    generator = np.random.default_rng(0)
    values = np.array([1, 2, 3, 4, 5, 6, 7, 6, 8])  # after "... 5 6" comes 7; after another 6 comes 8
    keys = generator.normal(0, 0.05, (9, WIDTH))
    args = argparse.Namespace(k=9, lmbda=0.5, min_knns=9_999_999, pool=100, chain_power=4.0, chain_trust=0.8)
    queries = torch.zeros(7, WIDTH)
    queries[6] = torch.from_numpy(keys[8])  # nearest to the wrong one
    sequence = ScoredSequence(0, queries, torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.full((7,), math.log(0.01)))
    (long,) = build(tmp_path, keys, values, None, args).score([sequence])
    args.chain_power = 0.0
    (flat,) = build(tmp_path, keys, values, None, args).score([sequence])
    assert long.knn_log_probs[6].exp() > 0.99 and flat.knn_log_probs[6].exp() < 0.3
    assert long.lmbda[0] == pytest.approx(1 / (1 + 2**0.8)) and (long.lmbda.diff() > 0).all()
    assert long.lmbda[1] == pytest.approx(0.5)
    args.chain_power = 1e6
    (endless,) = build(tmp_path, keys, values, None, args).score([sequence])
    assert endless.knn_log_probs[6].exp() > flat.knn_log_probs[6].exp() and endless.log_probs.isfinite().all()


def test_flag_types() -> None:
    assert natural_float("0") == 0 and natural_float("2.5") == 2.5
    for text in ("-1", "inf", "nan", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 0"):
            natural_float(text)
