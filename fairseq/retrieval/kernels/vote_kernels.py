"""Compiled loops that count votes (`voting`). They need numba (`kernels`)."""

from __future__ import annotations

import math

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import compiled, compiled_in_order

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.intrinsics import single_of_bits

NO_WEIGHT = np.float32(-1e29)  # scores up to this are of entries that were not found, or that the index lacks
LEAST_EXPONENT = np.float32(-87)  # exponentials of smaller numbers are subnormal, and are taken as 0
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # places, ids and scores of candidates
# ln 2 in two parts: the low bits of the first are zero, so that its products with small integers are exact.
LN2_HIGH, LN2_LOW = np.float32(0.693145751953125), np.float32(1.4286068203e-06)


@compiled_in_order
def exp_of_negative(x: np.float32) -> np.float32:
    """e^x for x <= 0, with a relative error of 1e-7, without a branch, so that loops over it are vectorised: 2^n e^r
    with |r| <= ln 2 / 2, where the terms of the series up to r^7 are enough. NaN gives NaN."""
    n = np.int32(x * np.float32(1 / math.log(2)) - np.float32(0.5))
    r = x - np.float32(n) * LN2_HIGH - np.float32(n) * LN2_LOW
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = series * r + np.float32(1)
    series = series * r + np.float32(1)
    power = single_of_bits(np.int32((n + np.int32(127)) << np.int32(23)))
    return np.float32(0) if x < LEAST_EXPONENT else series * power


@compiled
def count_votes(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    searched: Arrays,
    offered: Arrays,
    found_weights: np.ndarray,
    weights: np.ndarray,
    values: np.ndarray,
    targets: np.ndarray,
    inverse_temperatures: np.ndarray,
    least: float,
    log_probs: np.ndarray,
    found_matches: np.ndarray,
    given_matches: np.ndarray,
    matches: np.ndarray,
) -> None:
    """Writes, for each row b, log_probs[b, t] at each of S temperatures, no less than `least` (minus infinity without
    candidates), and the positions of the candidates with the value targets[b]: matches[b, 0] of those found by a
    search, at the start of the search's row of found_matches, and matches[b, 1] of those that were given, at the start
    of row b's part of given_matches.

    bounds (B + 1,) divides the work among threads. searched: the number of each row's search (B,), -1 for none; ids and
    scores (n, k) of n searches, to which found_matches (n, k) corresponds. offered: bounds (B + 1,) of each row's given
    entries; their ids and scores (m,), to which given_matches (m,) corresponds. found_weights (n, k) and weights (m,),
    or arrays of length 0 where all weights are 1."""
    found_at, found_ids, found_scores = searched
    given_bounds, given_ids, given_scores = offered
    lowest = np.float32(-np.inf)
    for row in range(first_row, last_row):
        at, first, last = found_at[row], given_bounds[row], given_bounds[row + 1]
        given, mine = given_scores[first:last], given_matches[first:last]
        given_weights = weights[first:last]
        found = found_scores[max(at, 0), : found_scores.shape[1] if at >= 0 else 0]
        more = _find_matches(given_ids[first:last], values, targets[row], mine)
        count = 0
        if at >= 0:
            count = _find_matches(found_ids[at], values, targets[row], found_matches[at])
        matches[row, 0], matches[row, 1] = count, more
        peak = max(_largest(found), _largest(given))
        hit_peak = lowest
        for place in range(count):
            hit_peak = max(hit_peak, found[found_matches[at, place]])
        for place in range(more):
            hit_peak = max(hit_peak, given[mine[place]])
        for t in range(len(inverse_temperatures)):
            inverse = inverse_temperatures[t]
            total, mass = np.float32(0), np.float32(0)
            if len(found_weights) == 0:
                for place in range(len(found)):
                    total += exp_of_negative((found[place] - peak) * inverse)
                for place in range(count):
                    mass += exp_of_negative((found[found_matches[at, place]] - hit_peak) * inverse)
            else:
                for place in range(len(found)):
                    total += found_weights[at, place] * exp_of_negative((found[place] - peak) * inverse)
                for place in range(count):
                    match = found_matches[at, place]
                    mass += found_weights[at, match] * exp_of_negative((found[match] - hit_peak) * inverse)
            if len(weights) == 0:
                for place in range(len(given)):
                    total += exp_of_negative((given[place] - peak) * inverse)
                for place in range(more):
                    mass += exp_of_negative((given[mine[place]] - hit_peak) * inverse)
            else:
                for place in range(len(given)):
                    total += given_weights[place] * exp_of_negative((given[place] - peak) * inverse)
                for place in range(more):
                    mass += given_weights[mine[place]] * exp_of_negative((given[mine[place]] - hit_peak) * inverse)
            if len(found) + len(given) == 0:
                log_probs[row, t] = lowest
            elif lowest < peak <= NO_WEIGHT:  # the lowest is that of scores that are not numbers
                log_probs[row, t] = np.float32(least)
            else:
                share = lowest
                if count + more:
                    share = np.float32((hit_peak - peak) * inverse + math.log(mass))
                share -= np.float32(math.log(total))
                log_probs[row, t] = np.float32(least) if share < least else share


@compiled
def _largest(scores: np.ndarray) -> np.float32:
    largest = np.float32(-np.inf)
    for place in range(len(scores)):
        largest = max(largest, scores[place])
    return largest


@compiled
def _find_matches(ids: np.ndarray, values: np.ndarray, target: int, matches: np.ndarray) -> int:
    """Writes the positions of the entries whose value is the target to `matches`, and returns their number. An id of -1
    reads the last value, as in the original. There is no branch, because it would often be mispredicted."""
    count = 0
    for place in range(len(ids)):
        matches[count] = place
        count += int(values[ids[place]] == target)
    return count


@compiled
def collect_matches(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    searched: Arrays,
    offered: Arrays,
    found_matches: np.ndarray,
    given_matches: np.ndarray,
    matches: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Writes the matches of row b that `count_votes` found, those from searches first, to positions bounds[b] to
    bounds[b + 1] of rows, ids and scores, whose length is the number of all matches."""
    found_at, found_ids, found_scores = searched
    given_bounds, given_ids, given_scores = offered
    for row in range(first_row, last_row):
        place, at, first = bounds[row], found_at[row], given_bounds[row]
        rows[place : bounds[row + 1]] = row
        for match in range(matches[row, 0]):
            column = found_matches[at, match]
            ids[place], scores[place] = found_ids[at, column], found_scores[at, column]
            place += 1
        for match in range(matches[row, 1]):
            position = first + given_matches[first + match]
            ids[place], scores[place] = given_ids[position], given_scores[position]
            place += 1
