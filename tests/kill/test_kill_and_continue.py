"""Jobs that are killed and started again end with the results of uninterrupted jobs. A few kills each here; KILLS=25
for a thorough test (one or two minutes per stage)."""

from __future__ import annotations

import os

import pytest

from tests.kill.harness import torment
from tests.kill.stages import NEEDS, STAGES


@pytest.mark.parametrize("name", STAGES)
def test_the_same_result_after_kills(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    report = torment(name, int(os.environ.get("KILLS", 2)))
    assert not report.different, f"{report.identical} of {report.runs} identical; differing: {report.different}"
    assert report.identical == report.runs > 0
