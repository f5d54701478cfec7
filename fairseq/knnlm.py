"""The retrieval step: turns scored sequences into better log-probabilities.

For a token with query q, LM probability p_LM and candidate entries (key k_i, value v_i), kNN-LM (Khandelwal et al.,
2020, equations 2 and 3) and RetoMaton (Alon et al., 2022, section 3) compute

    p_kNN(w) = sum over candidates with v_i = w of exp(s_i / T) / sum over all candidates of exp(s_i / T)
    p(w)     = lambda p_kNN(w) + (1 - lambda) p_LM(w)

where s_i is minus the squared distance of q and k_i, and T the temperature. The methods differ in which entries are
candidates, when the index is searched, and how large lambda is; the strategy (`retrieval/retrievers`) decides that.
Perplexity needs only p of the right token, so no array here is as wide as the vocabulary. Sequences do not depend on
each other, so many of them advance together, with one batched search and one batched distance computation per step."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairseq.errors import BadFlag
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.entries import Entries, as_tensor, no_entries
from fairseq.retrieval.flag_conflicts import check_strategy_flags, strategy_name
from fairseq.retrieval.index import Index
from fairseq.retrieval.lockstep import Lockstep, RetrievalResult
from fairseq.retrieval.open_stores import Stores, open_stores, require_stores
from fairseq.retrieval.parallel import Team
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY, Candidates, Proposal, Resources, Retriever, Step
from fairseq.retrieval.retrievers.checks import Checks, are_needed
from fairseq.retrieval.retrievers.interface import defines_weigh
from fairseq.retrieval.saved.searches import SearchCache
from fairseq.retrieval.similarity import Similarity
from fairseq.retrieval.voting import NOT_FOUND, Searched, count_votes
from fairseq.scored_sequences import ScoredSequence

logger = logging.getLogger(__name__)

MOST_NEIGHBOURS = 1 << 16  # largest `k` that is accepted when the datastore has fewer entries
CHUNK_CANDIDATES = 1 << 23  # limits the memory of one search of independent tokens


def mix(lm_log_probs: Tensor, knn_log_probs: Tensor, lmbda: Tensor) -> Tensor:
    """log(lmbda p_kNN + (1 - lmbda) p_LM) from the logs in nats; all of one shape."""
    return torch.logaddexp(torch.log1p(-lmbda) + lm_log_probs, lmbda.log() + knn_log_probs)


class KNNLM:
    """Scores sequences with a datastore. k: neighbours a search returns; lmbda: constant weight of retrieval.

    more_temperatures: further temperatures at which p_kNN is computed; they affect nothing else. searches: saved search
    results, which are used in place of the index. checks: checks of what the strategy returns, or None."""

    def __init__(
        self,
        datastore: Datastore,
        index: Index,
        retriever: Retriever,
        similarity: Similarity,
        k: int,
        lmbda: float,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
        more_temperatures: Sequence[float] = (),
        searches: SearchCache | None = None,
        checks: Checks | None = None,
    ) -> None:
        self.index, self.retriever, self.similarity, self.searches = index, retriever, similarity, searches
        self.k, self.lmbda, self.temperature, self.checks = k, lmbda, temperature, checks
        self.device = torch.device(device)
        self.inverse_temperatures = 1 / torch.tensor([temperature, *more_temperatures], device=self.device)  # (S,)
        self.values, self.datastore = as_tensor(datastore.values).to(self.device), datastore
        self._team = Team(retriever)

    def score(self, sequences: list[ScoredSequence]) -> list[RetrievalResult]:
        """Advances all `sequences` together, divided among the CPU's threads, and returns a result for each."""
        if not sequences:
            return []
        sequential = self.retriever.sequential and self.device.type == "cpu"
        threads = min(torch.get_num_threads(), len(sequences)) if sequential else 1
        if self._team.retrievers[0] is not self.retriever:
            self._team = Team(self.retriever)
        if threads == 1:
            return self._score_together(sequences, self.retriever)
        self._build_lazy_tables(sequences[0])
        return self._team.score(sequences, threads, self._score_together)

    def _build_lazy_tables(self, sequence: ScoredSequence) -> None:
        """Builds lazy tables before starting threads, each of which would otherwise build them."""
        query = sequence.queries[:1].float()
        first = torch.zeros(len(query), dtype=torch.int64)
        self.similarity.of_entries(query, first, first)

    def _score_together(self, sequences: list[ScoredSequence], retriever: Retriever) -> list[RetrievalResult]:
        chunk = None if retriever.sequential else max(1, CHUNK_CANDIDATES // self.k)
        batch = Lockstep(sequences, self.device, len(self.inverse_temperatures), self.lmbda, retriever.needs, chunk)
        retriever.start()
        for tokens in batch.steps:
            if self._team.stopped.is_set():
                return []
            self._advance(batch, tokens, retriever)
        return batch.results(mix(batch.lm_log_probs, batch.knn_log_probs[:, 0], batch.lmbda))

    def _advance(self, batch: Lockstep, tokens: slice, retriever: Retriever) -> None:
        """One step: B tokens of the batch."""
        step = batch.step(tokens)
        proposal, searched, given = self.retrieve(step, retriever)
        outcome = count_votes(searched, given, self.values, batch.targets[tokens], self.inverse_temperatures)
        retriever.observe(step, outcome.matched)
        batch.store(tokens, outcome.log_probs, proposal, outcome.candidates, outcome.matches)

    def retrieve(self, step: Step, retriever: Retriever) -> tuple[Proposal, Searched, Entries]:
        """The candidates of a step, before the right tokens are known: the strategy's proposal, and, with scores and
        weights, the entries found by a search and the proposed entries. The caller must call the strategy's `observe`
        afterwards."""
        proposal = retriever.propose(step)
        if self.checks is not None:
            self.checks.proposal(proposal, step)
        searched, given = self._search(step, proposal.search), self._given(step, proposal.entries)
        if defines_weigh(retriever):
            proposal = self._weigh(step, retriever, proposal, searched, given)
        return proposal, searched, given

    def _weigh(
        self, step: Step, retriever: Retriever, proposal: Proposal, searched: Searched, given: Entries
    ) -> Proposal:
        """Sets the weights of `searched` and `given` to the strategy's, and returns the proposal with its lambda."""
        candidates = Candidates.of(len(step), searched, given, self.values, self.temperature)
        weights = retriever.weigh(step, candidates)
        if self.checks is not None:
            self.checks.weights(weights, candidates)
        if weights is None:
            return proposal
        if weights.votes is not None:
            searched.weights = weights.votes[: candidates.found].reshape(searched.ids.shape)
            given.weights = weights.votes[candidates.found :]
        return proposal if weights.lmbda is None else replace(proposal, lmbda=weights.lmbda)

    def _search(self, step: Step, wanted: Tensor) -> Searched:
        """One batched search for the tokens that need it, `wanted` (B,) bool."""
        rows = wanted.nonzero().squeeze(1)
        if not len(rows):
            nothing = torch.zeros(0, self.k, device=self.device)
            return Searched(rows, nothing.long(), nothing)
        queries = step.queries[rows]
        if self.searches is None:
            distances, ids = self.index.search(queries, self.k)
        else:
            distances, ids = self.searches.look_up(step.sample_ids[rows], step.positions[rows], self.k)
        scores = self.similarity.of_search(queries, distances, ids)
        if bool((ids[:, -1] < 0).any()):  # padding is at the end of a row
            invalid = ~queries.isfinite().all(1, keepdim=True)  # these find nothing, which must be an error
            scores = scores.masked_fill(ids < 0, NOT_FOUND).masked_fill(invalid, torch.nan)
        return Searched(rows, ids, scores)

    def _given(self, step: Step, entries: Entries | None) -> Entries:
        """The entries that the strategy proposes, with scores, by one batched distance computation."""
        if entries is None or not len(entries):
            return no_entries(self.device)
        return replace(entries, scores=self.similarity.of_entries(step.queries, entries.rows, entries.ids))




def build_knnlm(
    args: argparse.Namespace,
    dimension: int,
    device: torch.device | str = "cpu",
    stores: Stores | None = None,
    more_temperatures: Sequence[float] = (),
    searches: SearchCache | None = None,
    vocabulary: int | None = None,
) -> KNNLM:
    """The KNNLM that eval_lm's flags describe, for queries of width `dimension`; `stores` if they are open already,
    else the number of words that the datastore's values must be of."""
    if stores is None:
        require_stores(args)
    if not 0 <= args.lmbda <= 1:
        raise BadFlag("--lmbda", args.lmbda, "a number from 0 to 1")
    if args.k < 1:
        raise BadFlag("--k", args.k, "at least 1")
    _warn_of_surprises(args)
    stores = stores or open_stores(args, dimension, device, vocabulary)
    name = strategy_name(args)
    clusters = stores.clusters(args.members) if args.members is not None and name != "knnlm" else None
    count = stores.index.count
    if args.k > max(count, MOST_NEIGHBOURS):
        raise BadFlag("--k", args.k, f"at most the {count} entries of the index")
    if args.k > count:
        logger.warning("--k %d: the index has %d entries, and a search returns no more", args.k, count)
    common = (stores.datastore.size, args.k, args.lmbda, clusters, stores.device, args.knn_temp)
    resources = Resources(*common, similarity=stores.similarity)
    retriever = RETRIEVER_REGISTRY[name](args, resources)
    checked = are_needed(retriever, getattr(args, "check_strategy", "auto"))
    logger.info("strategy %s, k %d, lambda %g, temperature %g", name, args.k, args.lmbda, args.knn_temp)
    return KNNLM(
        stores.datastore,
        stores.index,
        retriever,
        stores.similarity,
        args.k,
        args.lmbda,
        args.knn_temp,
        stores.device,
        more_temperatures,
        searches,
        Checks(name, stores.datastore.size) if checked else None,
    )


def _warn_of_surprises(args: argparse.Namespace) -> None:
    """One line for each combination of flags that runs, as in the original, but hardly as meant."""
    max_knns = args.k if args.max_knns is None else args.max_knns
    if args.lmbda == 0 and args.strategy is None:
        logger.warning("--lmbda 0: retrieval has no weight in the result; the paper's is 0.25")
    if args.lmbda == 1 and args.strategy is None:
        logger.warning("--lmbda 1: the model has no weight, so words that retrieval does not find are impossible")
    if getattr(args, "dstore_weights", False) and RETRIEVER_REGISTRY[strategy_name(args)].sequential:
        logger.warning("--dstore-weights: in a merged datastore a pointer leads to the next entry that was kept")
    check_strategy_flags(args)
    if not RETRIEVER_REGISTRY[strategy_name(args)].sequential:
        return
    if args.min_knns == 0:
        logger.warning("--min-knns 0: the index is never searched, so no token is retrieved; 1 searches least")
    elif args.min_knns < 9999999 and max_knns < args.min_knns:
        said = "--max-knns %d is below --min-knns %d: at least every second token is searched"
        logger.warning(said, max_knns, args.min_knns)
