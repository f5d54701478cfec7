"""How a line of text becomes words: split at runs of Unicode whitespace. No lower-casing, no punctuation handling."""

from __future__ import annotations

import re

SPACE_NORMALIZER = re.compile(r"\s+")


def tokenize_line(line: str) -> list[str]:
    """The words of `line`. `str.split` cuts exactly where `SPACE_NORMALIZER` matches."""
    return line.split()
