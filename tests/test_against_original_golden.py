"""Every setting of the golden bundle, through the command line that the original was run with: loss, saved searches,
the tokens that were searched, each token's log-probability, the number of candidates, and the first candidates
themselves. Tolerances are those of the bundle's README; measured differences are far below (about 2e-6 nats)."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval import kernels
from fairseq.retrieval.index import FaissIndex
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever
from tests.golden_runs import Run, evaluated, figure

GOLDEN = Path(__file__).resolve().parent / "fixtures" / "golden"
COMMANDS: dict[str, str] = json.loads((GOLDEN / "MANIFEST.json").read_text())["eval_commands"]
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "expected.npz").items())
RETRIEVING = [name for name in COMMANDS if name != "a_base"]
# g differs from d only in lambda and k from d only in a default spelt out: neither touches the search.
SAME_SEARCHES = {"g_members_lmbda0.5": "d_retomaton_members", "k_members_nomaxknns": "d_retomaton_members"}


@pytest.fixture(scope="session")
def evaluate(run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """evaluate(setting, *more flags): runs a golden command; equal calls share one run."""

    @functools.cache
    def evaluate(setting: str, *more: str) -> Run:
        return evaluated(run_cli, GOLDEN, COMMANDS[setting], tmp_path_factory.mktemp("golden"), *more)

    return evaluate


@pytest.mark.parametrize("setting", COMMANDS)
def test_loss(setting: str, evaluate: Any) -> None:
    run, expected = evaluate(setting), EXPECTED[setting]
    assert abs(figure(run, "loss_base2") - expected["loss_base2"]) < 5e-5
    assert figure(run, "perplexity") == pytest.approx(expected["ppl"], rel=1e-5)
    assert figure(run, "count") == expected["count"]
    printed = re.search(r"Loss \(base 2\): (\S+), Perplexity: (\S+)", run.log)
    assert printed is not None
    assert abs(float(printed[1]) - expected["loss_base2"]) <= 1.01e-4
    assert abs(float(printed[2]) - expected["ppl"]) <= 1.01e-2


@pytest.mark.parametrize("setting", RETRIEVING)
def test_saved_searches(setting: str, evaluate: Any) -> None:
    run, expected = evaluate(setting), EXPECTED[setting]
    printed = re.search(r"Lookups saved: (\S+)%", run.log)
    assert printed is not None
    assert abs(float(printed[1]) - expected["lookups_saved_pct_logged"]) < 1e-6
    assert abs(figure(run, "searches_saved_percent") - 100 * expected["fraction_tokens_not_searched"]) < 1e-6
    searched = ARRAYS[SAME_SEARCHES.get(setting, setting) + "/searched"]
    np.testing.assert_array_equal(run.tokens("searched"), searched)


@pytest.mark.parametrize("setting", COMMANDS)
def test_log_probability_of_each_token(setting: str, evaluate: Any) -> None:
    name = "log_probs" if setting in RETRIEVING else "lm_log_probs"
    difference = np.abs(evaluate(setting).tokens(name) - ARRAYS[setting + "/positional_scores"])
    assert difference.max() < 1e-3
    assert np.median(difference) < 1e-5


@pytest.mark.parametrize("setting", [name for name in RETRIEVING if name + "/n_knns" in ARRAYS])
def test_candidates_of_each_token(setting: str, evaluate: Any) -> None:
    run = evaluate(setting)
    np.testing.assert_array_equal(run.tokens("candidates"), ARRAYS[setting + "/n_knns"])
    np.testing.assert_array_equal(run.tokens("matched"), ARRAYS[setting + "/n_correct"])
    np.testing.assert_allclose(run.tokens("knn_log_probs"), ARRAYS[setting + "/knn_lp"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("setting", ["d_retomaton_members", "e_members_minknns9999999"])
def test_array_code_agrees_too(setting: str, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled loops: the same candidates, and the same numbers to rounding."""
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    run = evaluate(setting, "--seed", "2")  # nothing here is drawn at random: it only makes this another run
    np.testing.assert_array_equal(run.tokens("searched"), ARRAYS[setting + "/searched"])
    np.testing.assert_array_equal(run.tokens("candidates"), ARRAYS[setting + "/n_knns"])
    np.testing.assert_array_equal(run.tokens("matched"), ARRAYS[setting + "/n_correct"])
    assert np.abs(run.tokens("log_probs") - ARRAYS[setting + "/positional_scores"]).max() < 1e-3


def test_scored_sequences(evaluate: Any) -> None:
    """The LM's half: order, lengths, targets, log-probabilities and queries."""
    run = evaluate("b_knnlm")
    np.testing.assert_array_equal([part.sample_id for part in run.scored], ARRAYS["sample_ids"])
    np.testing.assert_array_equal([len(part) for part in run.scored], ARRAYS["lengths"])
    np.testing.assert_array_equal(np.concatenate([part.targets for part in run.scored]), ARRAYS["tokens"])
    log_probs = np.concatenate([part.lm_log_probs for part in run.scored])
    np.testing.assert_allclose(log_probs, ARRAYS["lm_positional_scores"], rtol=0, atol=1e-4)
    queries = np.concatenate([part.queries for part in run.scored])[:512]
    np.testing.assert_allclose(queries, ARRAYS["queries_first512"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", ["b_knnlm", "d_retomaton_members", "h_members_probe1_k512"])
def test_candidates_of_the_first_tokens(setting: str, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traces: ids and distances of who voted, search results first, then pointers and their clusters' members."""
    found: list[tuple[np.ndarray, np.ndarray]] = []  # one per searched token
    pointed: list[np.ndarray] = []  # one per proposal
    measured: list[np.ndarray] = []
    search, distances, propose = FaissIndex.search, FaissIndex.distances, RetomatonRetriever.propose

    def spying_search(self: Any, queries: Any, k: int) -> Any:
        result = search(self, queries, k)
        found.extend(zip(result[1].numpy(), result[0].numpy(), strict=True))
        return result

    def spying_distances(self: Any, *arguments: Any) -> Any:
        measured.append(distances(self, *arguments))
        return measured[-1]

    def spying_propose(self: Any, step: Any) -> Any:
        proposal = propose(self, step)
        pointed.append(proposal.entries.ids.numpy())
        return proposal

    monkeypatch.setattr(FaissIndex, "search", spying_search)
    monkeypatch.setattr(FaissIndex, "distances", spying_distances)
    monkeypatch.setattr(RetomatonRetriever, "propose", spying_propose)
    run = evaluate(setting, "--lockstep-tokens", "1")  # one sequence after the other, so the calls are in text order
    searched, searches, measures = run.tokens("searched"), iter(found), iter(measured)
    ids_of, distances_of = ARRAYS[setting + "/trace_knns"], ARRAYS[setting + "/trace_dists"]
    offsets, pointer_offsets = ARRAYS[setting + "/trace_knns_off"], ARRAYS[setting + "/trace_ext_off"]
    for token, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        pointers = pointed[token] if pointed else np.zeros(0, np.int64)
        extended = ARRAYS[setting + "/trace_ext"][pointer_offsets[token] : pointer_offsets[token + 1]]
        np.testing.assert_array_equal(np.sort(pointers), np.sort(extended))
        ids, squared = next(searches) if searched[token] else (np.zeros(0, np.int64), np.zeros(0, np.float32))
        squared = np.concatenate([squared, next(measures)]) if len(pointers) else squared
        ids = np.concatenate([ids, pointers])
        np.testing.assert_array_equal(np.sort(ids), np.sort(ids_of[start:end]))
        np.testing.assert_allclose(np.sort(-squared), np.sort(distances_of[start:end]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["b_knnlm", "d_retomaton_members", "f_members_minknns20", "n_members_dot"])
@pytest.mark.parametrize(
    "flags",
    [("--batch-size", "1"), ("--batch-size", "4"), ("--lockstep-tokens", "1"), ("--lockstep-tokens", "100")],
    ids=" ".join,
)
def test_grouping_does_not_matter(setting: str, flags: tuple[str, ...], evaluate: Any) -> None:
    assert_same(evaluate(setting), evaluate(setting, *flags))


@pytest.mark.parametrize("setting", ["d_retomaton_members", "m_noptr_recompute_l2"])
def test_threads_do_not_matter(setting: str, evaluate: Any) -> None:
    short = ("--gen-subset", "test")
    one = evaluate(setting, *short)
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    try:
        assert_same(one, evaluate(setting, *short, "--seed", "1"))  # the default: it only makes this another run
    finally:
        torch.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])


def assert_same(first: Run, second: Run) -> None:
    """Equal losses to 1e-6 bits, and the same searches with the same candidates."""
    assert first is not second
    assert abs(figure(first, "loss_base2") - figure(second, "loss_base2")) < 1e-6
    for name in ("searched", "candidates", "matched"):
        np.testing.assert_array_equal(first.tokens(name), second.tokens(name))
