"""From text to an evaluation with a learned gate: features of the LM against its whole distribution, training by the
command, and both strategies against a plain loop over tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq import options
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.knnlm import build_knnlm
from fairseq.retrieval.retrievers.adaptret_network import AdaptRet
from fairseq.retrieval.retrievers.ngrams import NgramTable
from fairseq.retrieval.saved.scores import ScoreCache
from fairseq.scored_sequences import FEATURES, contexts

LM = (
    "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 --context-window 96 "
    "--batch-size 2 --gen-subset valid --no-progress-bar"
)
STORE = (
    "--dstore-filename checkpoints/dstore16 --indexfile checkpoints/knn16.index --k 64 --probe 8 "
    "--knn-sim-func do_not_recomp_l2 --no-load-keys"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, golden: Path, run_cli: Callable[..., Any]) -> Path:
    """A folder with scores and a gate trained on them."""
    folder = tmp_path_factory.mktemp("adaptret")
    saved = run_cli("eval_lm", [*LM.split(), "--save-scores", folder / "scores", "--save-features"], cwd=golden)
    assert saved.status == 0, saved.stderr
    words = f"--scores {folder}/scores --save {folder}/gate.pt {STORE} --data data-bin --epochs 2 --no-progress-bar"
    done = run_cli("adaptret", [*words.split(), "--results-json", folder / "r.json"], cwd=golden)
    assert done.status == 0, done.stderr
    return folder


def build(golden: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.chdir(golden)
    words = [*LM.split(), "--knnlm", *STORE.split(), "--lmbda", "0.25", *flags]
    return build_knnlm(options.parse_args_and_arch(options.get_eval_lm_parser(), words), 32)


def test_contexts_of_a_row() -> None:
    assert contexts(torch.tensor([2, 7, 8]), 2).tolist() == [[2, 2, 2, 2], [7, 2, 2, 2], [8, 7, 2, 2]]


def test_features_of_the_language_model(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden)
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), LM.split())
    scoring = LMScoring(args, FEATURES)
    sample = next(iter(scoring.batches()))
    monkeypatch.setattr("fairseq.sequence_scorer.CHUNK_ELEMENTS", 20000)  # a few rows at a time
    sequences = scoring.score(sample)
    with torch.no_grad():
        output = scoring.models[0](**sample["net_input"])
        log_probs = scoring.models[0].get_normalized_probs(output, log_probs=True, sample=None)
    for row, sequence in enumerate(sequences):
        start = (sample.get("start_indices") or [0] * len(sequences))[row]
        source = sample["net_input"]["src_tokens"][row].tolist()
        for t in range(0, len(sequence), 5):
            whole = log_probs[row, start + t].double()
            assert sequence.lm_log_probs[t].item() == pytest.approx(whole[sequence.targets[t]].item(), abs=1e-4)
            assert sequence.features["lm_max"][t].item() == pytest.approx(whole.max().exp().item(), rel=1e-4)
            entropy = -(whole.exp() * whole).sum().item()
            assert sequence.features["lm_entropy"][t].item() == pytest.approx(entropy, rel=1e-4)
            before = [source[start + t - back] if start + t - back >= 0 else 2 for back in range(4)]
            assert sequence.features["context"][t].tolist() == before
            if t:
                assert before[0] == sequence.targets[t - 1]


def test_two_models_are_averaged(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden)
    words = LM.replace("checkpoint_best.pt", "checkpoint_best.pt:checkpoints/checkpoint_best.pt")
    one, two = (
        LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), text.split()), FEATURES)
        for text in (LM, words)
    )
    first, second = (scoring.score(next(iter(scoring.batches())))[0] for scoring in (one, two))
    torch.testing.assert_close(first.features["lm_entropy"], second.features["lm_entropy"], atol=1e-5, rtol=1e-5)


def test_the_command_reports(trained: Path) -> None:
    results = json.loads((trained / "r.json").read_text())
    assert results["epoch"] in (1, 2) and set(results["held_out_perplexity"]) >= {"0", "50", "90"}


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_adaptret_against_a_loop(trained: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    gate = ["--adaptret-checkpoint", str(trained / "gate.pt"), "--target-foss", str(share)]
    scores = ScoreCache.open(str(trained / "scores"))
    sequences = list(scores.sequences())
    results = build(golden, monkeypatch, "--strategy", "adaptret", *gate).score(sequences)
    everything = build(golden, monkeypatch, "--no-pointer").score(sequences)
    model, ngrams = AdaptRet.load(str(trained / "gate.pt")), NgramTable.open(str(trained / "gate.pt.ngrams"))
    searches = tokens = 0
    for sequence, result, knn in zip(sequences, results, everything):
        freq, fert = ngrams.look_up(sequence.features["context"].numpy())
        for t in range(0, len(sequence), 3):
            features = {
                "ctxt": sequence.queries[t : t + 1],
                "lm_max": sequence.features["lm_max"][t : t + 1, None],
                "lm_ent": sequence.features["lm_entropy"][t : t + 1, None],
                "freq": torch.from_numpy(freq[t : t + 1]),
                "fert": torch.from_numpy(fert[t : t + 1]),
            }
            lm_weight = model.weights(features)[0, 0].item()
            tokens, searches = tokens + 1, searches + int(result.searched[t])
            p_lm, p_knn = math.exp(sequence.lm_log_probs[t]), math.exp(knn.knn_log_probs[t])
            if abs(lm_weight - model.threshold(share)) < 1e-6:
                continue  # rounding may decide
            assert result.searched[t] == (lm_weight < model.threshold(share))
            weight = math.exp(lm_weight)
            mixed = weight * p_lm + max(1 - weight, 1e-5) * p_knn if result.searched[t] else p_lm
            assert result.log_probs[t].item() == pytest.approx(math.log(mixed), rel=2e-4, abs=1e-6)
    assert abs(1 - searches / tokens - share) < 0.12  # the share of other tokens than those it was chosen on


def test_retomaton_with_a_gate(trained: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ["--strategy", "retomaton_adaptret", "--adaptret-checkpoint", str(trained / "gate.pt")]
    sequences = list(ScoreCache.open(str(trained / "scores")).sequences())[:20]
    plain = build(golden, monkeypatch).score(sequences)
    learned = build(golden, monkeypatch, *gate).score(sequences)
    fewer = build(golden, monkeypatch, *gate, "--gate-foss", "0.5").score(sequences)
    adaptret = build(golden, monkeypatch, "--strategy", "adaptret", *gate[2:], "--target-foss", "0.5").score(sequences)
    for sequence, a, b, c, d in zip(sequences, plain, learned, fewer, adaptret):
        np.testing.assert_array_equal(a.searched, b.searched)  # the same searches, another weight
        torch.testing.assert_close(a.knn_log_probs, b.knn_log_probs)
        assert not (c.searched & ~d.searched).any()
        silent = ~c.searched & (c.candidates == 0)
        torch.testing.assert_close(c.log_probs[silent], sequence.lm_log_probs[silent])
    assert sum(result.searched.sum() for result in fewer) < sum(result.searched.sum() for result in learned)


def test_chains_with_a_gate(trained: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates are those of chains; the odds of lambda move a part of the way to the learned ones."""
    checkpoint = ["--adaptret-checkpoint", str(trained / "gate.pt")]
    both = ["--strategy", "retomaton_chains_adaptret", *checkpoint]
    sequences = list(ScoreCache.open(str(trained / "scores")).sequences())[:20]
    chains = build(golden, monkeypatch, "--strategy", "retomaton_chains").score(sequences)
    closed = build(golden, monkeypatch, *both, "--chain-gate", "0").score(sequences)
    half = build(golden, monkeypatch, *both, "--chain-gate", "0.5").score(sequences)
    learned = build(golden, monkeypatch, "--strategy", "adaptret", *checkpoint, "--target-foss", "0").score(sequences)
    for a, b, c, d in zip(chains, closed, half, learned):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(a.searched, c.searched)
        torch.testing.assert_close(a.knn_log_probs, c.knn_log_probs)
        shift = 0.5 * (torch.logit(d.lmbda.clamp(1e-4, 1 - 1e-4)) - math.log(0.25 / 0.75))
        torch.testing.assert_close(torch.logit(c.lmbda) - torch.logit(a.lmbda), shift, rtol=1e-3, atol=1e-3)
        assert shift.abs().max() > 0.01


def test_mistakes_are_one_sentence(trained: Path, golden: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    def error(command: str, words: str) -> str:
        return run_cli(command, words.split(), cwd=golden).error

    knn = f"{LM} --knnlm {STORE} --lmbda 0.25 --strategy adaptret"
    assert "--adaptret-checkpoint: found nothing" in error("eval_lm", knn)
    assert "fairseq-adaptret" in error("eval_lm", f"{knn} --adaptret-checkpoint checkpoints/checkpoint_best.pt")
    assert "--save-scores DIR" in error("eval_lm", f"{LM} --save-features")
    train = f"--scores {trained}/scores --save {tmp_path}/g {STORE}"
    assert "--data: found nothing" in error("adaptret", train)
    assert "--ngram-split" in error("adaptret", f"{train} --data data-bin --ngram-split test2")
    run_cli("eval_lm", [*LM.split(), "--save-scores", tmp_path / "bare"], cwd=golden)
    bare = f"--scores {tmp_path}/bare --save {tmp_path}/g {STORE} --features ctxt"
    assert "--save-features" in error("adaptret", bare)
