"""Where fairseq 0.10 and later keep meters, metrics and progress bars: the same modules under these names."""

from __future__ import annotations

import sys

from fairseq import meters, metrics, progress_bar

for _module in (meters, metrics, progress_bar):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = ["meters", "metrics", "progress_bar"]
