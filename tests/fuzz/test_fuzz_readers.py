"""Damaged files and flags: a reader succeeds or says one sentence; never a traceback, a crash, a hang, or memory beyond
the stated bound (1 GiB more than the process has). A few cases each here; FUZZ_CASES=10000 is the full campaign."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.campaign import run
from tests.fuzz.readers import READERS

BY_ITSELF = "index"  # a reader that is no part of the table
SLOW = ("checkpoint, zip", "checkpoint, legacy", "checkpoint, options", "options, evaluated", "model folder")


@pytest.mark.parametrize("name", [*READERS, BY_ITSELF])
def test_damage_is_read_or_refused(name: str) -> None:
    compares = name != BY_ITSELF and READERS[name].compares
    cases = int(os.environ.get("FUZZ_CASES", 40 if name in SLOW else 25 if compares else 200))
    outcome = run(name, cases)
    assert sum(outcome.counts.values()) == cases
    assert not outcome.failures, "\n".join(f"seed {seed}: {what}" for seed, what in outcome.failures[:3])
    if compares:
        assert outcome.counts["refused"] + outcome.counts["unharmed"] == cases
    elif name not in ("k-means, unfinished", "tokenizer of a text"):  # which begins anew; of which one file is read
        assert outcome.counts["refused"], "no input was damaged enough to be refused"
