"""Every setting of the bundle whose text repeats itself, through the command line that the original was run with:
entries have equal distances everywhere, and numbers depend on the order in which the original's sort leaves them.

That sort, and the last bits of distances, depend on vector instructions. Three settings are not even the original's own
on a processor without AVX-512; the others are alike with AVX2 and AVX-512."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from fairseq.retrieval import automaton, kernels
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever
from tests.golden_runs import Run, evaluated, figure

GOLDEN = Path(__file__).resolve().parent / "fixtures" / "golden-ties"
COMMANDS: dict[str, str] = json.loads((GOLDEN / "MANIFEST.json").read_text())["eval_commands"]
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "expected.npz").items())
WITH_AVX512_ONLY = [name for name, expected in EXPECTED.items() if not expected.get("same_on_avx2", True)]
# All of these sort scores that no search of an index has rounded in its own way.
SAME_ORDER = [name for name in COMMANDS if name[0] in "cdefghio"]
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and "AVX512" in faiss.get_compile_options()


def settings(names: list[str]) -> list[Any]:
    """Parameters, with those left out that this processor cannot reproduce."""
    instructions = np.show_config(mode="dicts")["SIMD Extensions"]
    usable = {*instructions["baseline"], *instructions["found"]}
    other_sort = pytest.mark.skipif(not usable & {"AVX2", "X86_V3", "X86_V4"}, reason="numpy sorts without AVX2 here")
    other_bits = pytest.mark.skipif(not AVX512, reason="torch and FAISS have no AVX-512 here")
    return [pytest.param(name, marks=[other_sort, *[other_bits] * (name in WITH_AVX512_ONLY)]) for name in names]


@pytest.fixture(scope="session")
def evaluate(run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """evaluate(setting, *more flags): runs a golden command; equal calls share one run."""

    @functools.cache
    def evaluate(setting: str, *more: str) -> Run:
        return evaluated(run_cli, GOLDEN, COMMANDS[setting], tmp_path_factory.mktemp("ties"), *more)

    return evaluate


def assert_agrees(run: Run, setting: str) -> None:
    """Loss to 4 decimals, and each token: whether it was searched, its candidates, its log-probability."""
    expected = EXPECTED[setting]
    assert abs(figure(run, "loss_base2") - expected["loss_base2"]) < 5e-5
    assert figure(run, "count") == expected["count"]
    retrieved = bool(run.retrieved)
    log_probs = run.tokens("log_probs" if retrieved else "lm_log_probs")
    assert np.abs(log_probs - ARRAYS[setting + "/positional_scores"]).max() < 1e-3
    if retrieved:
        for ours, theirs in (("searched", "searched"), ("candidates", "n_knns"), ("matched", "n_correct")):
            np.testing.assert_array_equal(run.tokens(ours), ARRAYS[f"{setting}/{theirs}"])


@pytest.mark.parametrize("setting", settings(list(COMMANDS)))
def test_setting(setting: str, evaluate: Any) -> None:
    assert_agrees(evaluate(setting), setting)


@pytest.mark.parametrize("setting", settings([name for name in COMMANDS if name[0] in "cdhjk"]))
def test_array_code_agrees_too(setting: str, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled loops."""
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    assert_agrees(evaluate(setting, "--seed", "2"), setting)  # nothing is drawn: it only makes this another run


@pytest.mark.parametrize("setting", settings(["d_members_max16_min1", "j_members_k16_max64_min16"]))
def test_grouping_does_not_matter(setting: str, evaluate: Any) -> None:
    assert_agrees(evaluate(setting, "--lockstep-tokens", "1"), setting)


@pytest.mark.parametrize("setting", settings(SAME_ORDER))
def test_order_of_pointers(setting: str, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows are put into the original's order, and not only those with ties, the pointers and members of each
    token stand as they did there, one by one."""
    monkeypatch.setattr(automaton, "rows_with_ties", lambda bounds, *_: torch.arange(len(bounds) - 1))
    order: dict[tuple[int, int], int] = {}
    propose = RetomatonRetriever.propose

    def spying_propose(self: Any, step: Any) -> Any:
        given = self.automaton.in_original_order(len(step))
        bounds, ids = given.within(len(step)), given.ids.numpy().astype("<i4")
        for row, token in enumerate(zip(step.sample_ids.tolist(), step.positions.tolist(), strict=True)):
            order[token] = zlib.crc32(ids[bounds[row] : bounds[row + 1]].tobytes())
        return propose(self, step)

    monkeypatch.setattr(RetomatonRetriever, "propose", spying_propose)
    run = evaluate(setting, "--seed", "3")
    tokens = [(part.sample_id, place) for part in run.retrieved for place in range(len(part.log_probs))]
    np.testing.assert_array_equal([order[token] for token in tokens], ARRAYS[setting + "/ext_crc"])
