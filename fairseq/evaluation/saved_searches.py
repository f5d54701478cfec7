"""The share of searches that were saved: the figure that the original prints, and the true share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class SavedSearches:
    """Counts searches over sequences.

    The original averages the lengths of the runs of tokens without a search before each search of a sample. A run at
    the end of a sample, after which no search follows, is not counted, so that its figure is a little too low. This
    class computes both that figure and the true one."""

    def __init__(self) -> None:
        self.tokens = 0
        self.searches = 0
        self.counted_tokens = 0

    def add(self, searched: NDArray[np.bool_]) -> None:
        """Adds one sequence; searched (T,): whether the index was searched for each token."""
        positions = np.flatnonzero(searched)
        self.tokens += len(searched)
        self.searches += len(positions)
        if len(positions):
            self.counted_tokens += int(positions[-1]) + 1

    @property
    def true_share(self) -> float:
        """Share of tokens without a search: 1 - searches / tokens. NaN for no tokens."""
        return 1 - self.searches / self.tokens if self.tokens else float("nan")

    @property
    def printed_share(self) -> float:
        """The share that the original prints as "Lookups saved". NaN when nothing was ever searched."""
        return 1 - self.searches / self.counted_tokens if self.searches else float("nan")


def count_saved(sequences: Iterable[NDArray[np.bool_]]) -> SavedSearches:
    """SavedSearches over the `searched` arrays of several sequences."""
    saved = SavedSearches()
    for searched in sequences:
        saved.add(searched)
    return saved
