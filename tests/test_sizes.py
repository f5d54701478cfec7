"""Numbers of bytes as text."""

from __future__ import annotations

import pytest

from fairseq.sizes import size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (12, "12 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12345, "12.3 kB"), (999999, "1 MB")]
    + [(4560000, "4.56 MB"), (103225485 * 1024, "106 GB"), (3e15, "3e+03 TB")],
)
def test_size_text(count: float, text: str) -> None:
    assert size_text(count) == text
