"""Votes: from the candidates of a step to the probability of its targets, at each of S temperatures T,

    p_kNN(w) = sum over candidates with v_i = w of exp(s_i / T) / sum over all candidates of exp(s_i / T)

(Khandelwal et al., 2020, equation 2). Candidates are the entries that a search found for some rows of the step, and the
entries that the strategy proposed; the sums are weighted by the weights of their votes. On the CPU a compiled loop
computes this; tensor operations do on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.retrieval import kernels
from fairseq.retrieval.entries import Entries
from fairseq.retrieval.kernels import vote_kernels

NO_WEIGHTS = np.empty(0, np.float32)  # tells the compiled loop that each given entry has weight 1
NO_FOUND_WEIGHTS = np.empty((0, 0), np.float32)  # the same for entries found by a search
NOT_FOUND = -torch.finfo(torch.float32).max
NO_MATCH = -10000.0  # log p_kNN of a target that no candidate has as its value, as in the original


@dataclass
class Searched:
    """What a search found: rows (n,) int64 of the step, ascending; ids (n, k) int64; scores (n, k) float32; weights (n,
    k) float32 of the votes, or None for weights of 1. An id of -1 has the last entry's value, as in the original, and
    the score NOT_FOUND: it never votes."""

    rows: Tensor
    ids: Tensor
    scores: Tensor
    weights: Tensor | None = None


@dataclass
class Outcome:
    """The votes of a step. log_probs (B, S): log p_kNN of the targets, nats, no less than NO_MATCH, and minus infinity
    for rows without candidates; candidates (B,) int64: number of candidates of each row; matched: the candidates whose
    value is the target, with scores, those found by a search first; matches (B,) int64: number of them in each row."""

    log_probs: Tensor
    candidates: Tensor
    matched: Entries
    matches: Tensor


def count_votes(
    searched: Searched, given: Entries, values: Tensor, targets: Tensor, inverse_temperatures: Tensor
) -> Outcome:
    """The outcome for targets (B,); values (N,) of the datastore, inverse_temperatures (S,) float32."""
    if kernels.AVAILABLE and targets.device.type == "cpu":
        return _count_compiled(searched, given, values, targets, inverse_temperatures)
    return _count_tensors(searched, given, values, targets, inverse_temperatures)


def _count_compiled(
    searched: Searched,
    given: Entries,
    values: Tensor,
    targets: Tensor,
    inverse_temperatures: Tensor,
) -> Outcome:
    assert given.scores is not None
    count, (searches, k) = len(targets), searched.ids.shape
    with_search, starts = searched.rows.numpy(), given.within(count).numpy()
    found_at = np.full(count, -1)
    found_at[with_search] = np.arange(searches)
    work = starts.copy()  # where a row's candidates begin
    work[1:] += k * np.cumsum(found_at >= 0)
    weights = NO_WEIGHTS if given.weights is None else given.weights.numpy()
    found_weights = NO_FOUND_WEIGHTS if searched.weights is None else searched.weights.numpy()
    log_probs = np.empty((count, len(inverse_temperatures)), np.float32)
    found = (found_at, searched.ids.numpy(), searched.scores.numpy())
    proposed = (starts, given.ids.numpy(), given.scores.numpy())
    of_values = (found_weights, weights, values.numpy(), targets.numpy(), inverse_temperatures.numpy(), NO_MATCH)
    counted = np.empty((count, 2), np.int64)
    places = np.empty((searches, k), np.int32), np.empty(len(given), np.int32), counted
    kernels.run_by_rows(vote_kernels.count_votes, work, found, proposed, *of_values, log_probs, *places)
    bounds = np.zeros(count + 1, np.int64)
    np.cumsum(counted.sum(1), out=bounds[1:])
    rows, ids = np.empty((2, int(bounds[-1])), np.int64)
    scores = np.empty(len(rows), np.float32)
    kernels.run_by_rows(vote_kernels.collect_matches, bounds, found, proposed, *places, rows, ids, scores)
    to = torch.from_numpy
    matched = Entries(to(rows), to(ids), to(scores), bounds=to(bounds), found=to(counted[:, 0].copy()))
    return Outcome(to(log_probs), to(work[1:] - work[:-1]), matched, matched.counts(count))


def _count_tensors(
    searched: Searched,
    given: Entries,
    values: Tensor,
    targets: Tensor,
    inverse_temperatures: Tensor,
) -> Outcome:
    assert given.scores is not None
    searches = torch.full_like(searched.rows, searched.ids.shape[1])
    candidates = given.counts(len(targets)).index_add(0, searched.rows, searches)
    peak = given.scores.new_full((len(targets),), -math.inf)
    peak[searched.rows] = searched.scores.amax(1)
    peak.scatter_reduce_(0, given.rows, given.scores, "amax")
    total = _sums_of_exp(given.scores - peak[given.rows], given.rows, given.weights, len(targets), inverse_temperatures)
    below = searched.scores - peak[searched.rows, None]
    for t, inverse in enumerate(inverse_temperatures):
        terms = (below * inverse).exp_()
        total[searched.rows, t] += (terms if searched.weights is None else terms * searched.weights).sum(1)

    row, column = (values[searched.ids] == targets[searched.rows, None]).nonzero(as_tuple=True)
    hit = (values[given.ids] == targets[given.rows]).nonzero().squeeze(1)
    rows = torch.cat([searched.rows[row], given.rows[hit]])
    ids = torch.cat([searched.ids[row, column], given.ids[hit]])
    scores = torch.cat([searched.scores[row, column], given.scores[hit]])
    weights = None
    if given.weights is not None or searched.weights is not None:
        found_weights = scores.new_ones(len(row)) if searched.weights is None else searched.weights[row, column]
        given_weights = scores.new_ones(len(hit)) if given.weights is None else given.weights[hit]
        weights = torch.cat([found_weights, given_weights])
    hit_peak = scores.new_full((len(targets),), -math.inf).scatter_reduce_(0, rows, scores, "amax")
    mass = _sums_of_exp(scores - hit_peak[rows], rows, weights, len(targets), inverse_temperatures)

    log_probs = (hit_peak - peak)[:, None] * inverse_temperatures + mass.log() - total.log()
    matches = torch.bincount(rows, minlength=len(targets))
    log_probs = log_probs.masked_fill((peak <= float(vote_kernels.NO_WEIGHT))[:, None], NO_MATCH)
    log_probs = torch.where(candidates[:, None] == 0, -math.inf, torch.clamp(log_probs, min=NO_MATCH))
    matched = Entries(rows, ids, scores).select(torch.argsort(rows, stable=True))
    matched.found = torch.bincount(searched.rows[row], minlength=len(targets))
    return Outcome(log_probs, candidates, matched, matches)


def _sums_of_exp(
    below: Tensor, rows: Tensor, weights: Tensor | None, count: int, inverse_temperatures: Tensor
) -> Tensor:
    """(count, S): sums of weight times exp(below / T) over the entries of each row; below, rows, weights (n,)."""
    sums = []
    for inverse in inverse_temperatures:
        terms = (below * inverse).exp_()
        sums.append(below.new_zeros(count).index_add(0, rows, terms if weights is None else terms * weights))
    return torch.stack(sums, 1)
