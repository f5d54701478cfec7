"""The compiled loop that finds ties (`tie_order`). It needs numba (`kernels`)."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval.kernels import compiled

GOLDEN_RATIO = 0x9E3779B97F4A7C15  # times 2^-64: multiples of it spread over all slots of a table


@compiled
def find_ties(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    ids: np.ndarray,
    scores: np.ndarray,
    bits: np.ndarray,
    norms: np.ndarray,
    near: float,
    tied: np.ndarray,
) -> None:
    """Writes to tied (B,) whether two entries of row b with different ids have equal scores or, where norms[b] is not
    negative, scores whose difference is at most near * (norms[b] + the row's largest absolute score). Somewhat larger
    differences may count too.

    ids, scores (n,): row b has those from bounds[b] to bounds[b + 1]; bits (n,) int32: the bits of the scores.

    Scores are put into the cells of a hash table, one cell for each distinct score, or for each interval as wide as the
    tolerance; one entry's id is stored per cell. The table has at least twice as many slots as a row has entries. It is
    not cleared between rows: `filled` has the row that filled each slot, and slots of other rows count as empty."""
    longest = 0
    for row in range(first_row, last_row):
        longest = max(longest, bounds[row + 1] - bounds[row])
    most = 1
    while 1 << most < 2 * longest:
        most += 1
    cells, owners = np.empty(1 << most, np.int64), np.empty(1 << most, np.int64)
    filled = np.full(1 << most, -1, np.int64)  # the row that filled each slot
    for row in range(first_row, last_row):
        first, last = bounds[row], bounds[row + 1]
        reach = 0.0
        if norms[row] >= 0:
            for place in range(first, last):
                reach = max(reach, abs(scores[place]))
            reach = near * (norms[row] + reach)
        power = 1
        while 1 << power < 2 * (last - first):
            power += 1
        found = False
        for place in range(first, last):
            if reach > 0:
                cell = np.int64(math.floor(scores[place] / reach))
            else:
                cell = np.int64(bits[place]) if scores[place] != 0 else np.int64(0)  # minus zero equals zero
            slot = _slot_of(cell, row, power, cells, filled)
            if filled[slot] == row:
                found = owners[slot] != ids[place]
            else:
                filled[slot], cells[slot], owners[slot] = row, cell, ids[place]
                if reach > 0:
                    for beside in (cell - 1, cell + 1):
                        other = _slot_of(beside, row, power, cells, filled)
                        found |= filled[other] == row and owners[other] != ids[place]
            if found:
                break
        tied[row] = found


@compiled
def _slot_of(cell: np.int64, row: int, power: int, cells: np.ndarray, filled: np.ndarray) -> np.int64:
    """The slot of `cell` among the first 2^power slots, or the empty slot where it would be inserted."""
    slot = np.int64((np.uint64(cell) * np.uint64(GOLDEN_RATIO)) >> np.uint64(64 - power))
    while filled[slot] == row and cells[slot] != cell:
        slot = np.int64((slot + 1) & ((1 << power) - 1))
    return slot
