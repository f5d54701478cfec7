"""Numbers of bytes as text."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(count: float) -> str:
    """`count` bytes with three digits and a decimal unit: "12.3 kB", "4.56 MB", "103 GB"."""
    power = 0
    while count >= 999.5 and power + 1 < len(UNITS):
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"
