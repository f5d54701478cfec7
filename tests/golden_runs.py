"""Runs a command of a golden bundle, and records the intermediate results of its evaluation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.knnlm import KNNLM, RetrievalResult
from fairseq.scored_sequences import ScoredSequence


@dataclass
class Run:
    """One evaluation: what it printed and wrote, and what each sample got, in the order of evaluation."""

    log: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    scored: list[ScoredSequence] = field(default_factory=list)
    retrieved: list[RetrievalResult] = field(default_factory=list)

    def tokens(self, name: str) -> np.ndarray:
        """A per-token array of all samples: a field of RetrievalResult, or of ScoredSequence without retrieval."""
        parts = self.retrieved if self.retrieved else self.scored
        return np.concatenate([np.asarray(getattr(part, name)) for part in parts])


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Records the intermediate results of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, kept in ((LMScoring, run.scored), (KNNLM, run.retrieved)):
            original = owner.score

            def score(self: Any, batch: Any, original: Any = original, kept: list[Any] = kept) -> Any:
                results = original(self, batch)
                kept.extend(results)
                return results

            patch.setattr(owner, "score", score)
        yield


def evaluated(run_cli: Any, bundle: Path, command: str, folder: Path, *more: str) -> Run:
    """What the command `eval_lm.py ...` of a manifest makes in the bundle's folder; its results file goes to `folder`.
    more: further flags."""
    run = Run()
    results = folder / "results.json"
    words = shlex.split(command)
    assert words[1] == "$RETO/eval_lm.py"
    with recorded(run):
        done = run_cli("eval_lm", [*words[2:], "--results-json", results, *more], cwd=bundle)
    assert done.status == 0, done.stderr
    run.log = done.stderr
    run.figures = json.loads(results.read_text())
    return run


def figure(run: Run, name: str) -> Any:
    """A number of the results file, wherever in it."""
    found = [part[name] for part in (run.figures, *run.figures.values()) if isinstance(part, dict) and name in part]
    assert found, f"{name} is not in the results file"
    return found[0]
