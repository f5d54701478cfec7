"""Compiled loops that expand pointers by the members of their clusters (`automaton`). They need numba (`kernels`)."""

from __future__ import annotations

import numpy as np

from fairseq.retrieval.kernels import compiled


@compiled
def find_states(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    pointers: np.ndarray,
    cluster_of: np.ndarray,
    indptr: np.ndarray,
    size: int,
    clusters: np.ndarray,
    votes: np.ndarray,
    widths: np.ndarray,
    available: np.ndarray,
) -> None:
    """Finds the distinct clusters of each row's pointers, ascending; how many of the row's pointers are in each of
    them; and the number of all their members.

    pointers (n,): row b has those from bounds[b] to bounds[b + 1]; size: number of members of all clusters. Results of
    row b: widths[b] clusters and their numbers of pointers, written to clusters and votes (n,) from bounds[b] on;
    available[b] (B,): the number of members, or -1 where a number read from cluster_of or indptr is out of range."""
    count = len(indptr) - 1
    for row in range(first_row, last_row):
        first, last = bounds[row], bounds[row + 1]
        own = clusters[first:last]
        for place in range(last - first):
            own[place] = cluster_of[pointers[first + place]]
        own.sort()
        width, members = -1, 0
        if first < last and (own[0] < 0 or own[last - first - 1] >= count):
            members = -1
        else:
            for place in range(last - first):
                cluster = own[place]
                if width >= 0 and own[width] == cluster:
                    votes[first + width] += 1
                    continue
                width += 1
                own[width], votes[first + width] = cluster, 1
                begin, end = indptr[cluster], indptr[cluster + 1]
                if not 0 <= begin <= end <= size:
                    members = -1
                    break
                members += end - begin
        widths[row], available[row] = width + 1, members


@compiled
def emit_members(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    pointer_bounds: np.ndarray,
    pointers: np.ndarray,
    clusters: np.ndarray,
    indptr: np.ndarray,
    members: np.ndarray,
    size: int,
    ids: np.ndarray,
    rows: np.ndarray,
    fine: np.ndarray,
) -> None:
    """Writes row b's pointers, then the members of its clusters in the given order of clusters, until
    ids[bounds[b]:bounds[b + 1]] is full, and b to the same positions of rows; fine[b]: whether all these ids are from 0
    to size - 1. Pointers and clusters of row b begin at pointer_bounds[b]."""
    for row in range(first_row, last_row):
        position, last = bounds[row], bounds[row + 1]
        rows[position:last] = row
        state = pointer_bounds[row]
        for pointer in range(state, pointer_bounds[row + 1]):
            ids[position] = pointers[pointer]
            position += 1
        while position < last:
            begin = indptr[clusters[state]]
            count = min(indptr[clusters[state] + 1] - begin, last - position)
            ids[position : position + count] = members[begin : begin + count]
            position += count
            state += 1
        in_range = True
        for position in range(bounds[row], last):
            in_range &= (ids[position] >= 0) & (ids[position] < size)
        fine[row] = in_range
