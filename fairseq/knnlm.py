"""The door between the wings, and the whole retrieval step in one place: scored sequences go in, better
log-probabilities come out.

For a token with query q, LM probability p_LM and candidate entries (key k_i, value v_i), kNN-LM (Khandelwal et al.,
2020, equations 2 and 3) and RetoMaton (Alon et al., 2022, section 3) compute

    p_kNN(w) = sum over candidates with v_i = w of exp(s_i / T) / sum over all candidates of exp(s_i / T)
    p(w)     = lambda p_kNN(w) + (1 - lambda) p_LM(w)

where s_i is minus the squared distance of q and k_i. The methods differ in who the candidates are and when the index is
searched, which is the retriever's business. Perplexity needs p of the right token alone, so nothing here is as wide as
the vocabulary. Sequences do not depend on each other: they advance in lock-step, one batched search and one batched
distance computation a step."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.errors import BadFlag, UserError
from fairseq.retrieval import kernels
from fairseq.retrieval.automaton import Entries, as_tensor, bounds_of, no_entries
from fairseq.retrieval.belonging import check_belongs
from fairseq.retrieval.clusters import KIND as CLUSTERS_KIND
from fairseq.retrieval.clusters import Clusters, load_clusters
from fairseq.retrieval.datastore import Datastore, read_weights
from fairseq.retrieval.index import Index, check_dimension
from fairseq.retrieval.open_index import EXACT, open_index, refinement
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY, Proposal, Resources, Retriever, Step
from fairseq.retrieval.search_cache import SearchCache
from fairseq.retrieval.similarity import Similarity, WeightedSimilarity, build_similarity, needs_keys
from fairseq.scored_sequences import ScoredSequence

logger = logging.getLogger(__name__)

NO_MATCH = -10000.0  # log p_kNN of a token that no candidate has as its value, as in the original
CHUNK_CANDIDATES = 1 << 23  # bounds the scratch memory of one search of independent tokens


@dataclass
class RetrievalResult:
    """What retrieval made of one ScoredSequence; all arrays are (T,).

    log_probs: log of the mixture, nats; searched: whether the index was searched; candidates: how many entries voted;
    matched: how many of them had the right value; lmbda: the weight of p_kNN; by_temperature: (T, S) log p_kNN, nats,
    at each of the KNNLM's S temperatures, the first of which is the one that was mixed."""

    sample_id: int
    log_probs: Tensor
    searched: NDArray[np.bool_]
    candidates: NDArray[np.int64]
    matched: NDArray[np.int64]
    lmbda: Tensor
    by_temperature: Tensor

    @property
    def knn_log_probs(self) -> Tensor:
        """(T,) log p_kNN at the temperature that was mixed, nats."""
        return self.by_temperature[:, 0]


def mix(lm_log_probs: Tensor, knn_log_probs: Tensor, lmbda: Tensor) -> Tensor:
    """log(lmbda p_kNN + (1 - lmbda) p_LM) from the logs in nats; all of one shape."""
    return torch.logaddexp(torch.log1p(-lmbda) + lm_log_probs, lmbda.log() + knn_log_probs)


class KNNLM:
    """Scores sequences with a datastore. k: neighbours a search returns; lmbda: constant weight of retrieval.

    more_temperatures: further temperatures at which p_kNN is wanted too; they change nothing else. searches: what the
    index answered before, which is then not asked again."""

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
    ) -> None:
        self.index, self.retriever, self.similarity, self.searches = index, retriever, similarity, searches
        self.k, self.lmbda = k, lmbda
        self.device = torch.device(device)
        self.inverse_temperatures = 1 / torch.tensor([temperature, *more_temperatures], device=self.device)  # (S,)
        self.values, self.keys = as_tensor(datastore.values).to(self.device), datastore.keys

    def score(self, sequences: list[ScoredSequence]) -> list[RetrievalResult]:
        """Advances all `sequences` together and returns a result for each."""
        if not sequences:
            return []
        batch = _Batch(sequences, self.device, len(self.inverse_temperatures), self.retriever.needs)
        self.retriever.start()
        for tokens in batch.steps(self.retriever.sequential, max(1, CHUNK_CANDIDATES // self.k)):
            self._advance(batch, tokens)
        return batch.results()

    def _advance(self, batch: _Batch, tokens: Tensor) -> None:
        """One step: the tokens at flat positions `tokens` (B,) of the batch."""
        step = batch.step(tokens)
        targets = batch.targets[tokens]
        proposal = self.retriever.propose(step)
        found = self._search(step, proposal, targets)
        given = self._score_entries(step, proposal.entries, targets)

        # p_kNN of the target, per temperature: log of the matching candidates' share of exp(score / T).
        inverse = self.inverse_temperatures
        peak = torch.maximum(found.peak, given.peak)
        total = found.total_at(peak, inverse) + given.total_at(peak, inverse)
        matched = found.matched if not len(given.matched) else _join(found.matched, given.matched)
        knn = _log_sum_exp(matched, len(step), inverse) - (peak[:, None] * inverse + total.log())  # (B, S)
        candidates = found.counts + given.counts
        knn = torch.where(candidates[:, None] == 0, -math.inf, torch.clamp(knn, min=NO_MATCH))

        lmbda = torch.full_like(knn[:, 0], self.lmbda) if proposal.lmbda is None else proposal.lmbda.to(knn)
        self.retriever.observe(step, matched)
        counts = matched.counts(len(step))
        batch.store(tokens, mix(step.lm_log_probs, knn[:, 0], lmbda), knn, lmbda, proposal.search, candidates, counts)

    def _search(self, step: Step, proposal: Proposal, targets: Tensor) -> _Votes:
        """One batched search for the tokens that need it."""
        rows = proposal.search.nonzero().squeeze(1)
        if not len(rows):
            return self._no_votes(step)
        queries = step.queries[rows]
        if self.searches is None:
            distances, ids = self.index.search(queries, self.k)
        else:
            distances, ids = self.searches.look_up(step.sample_ids[rows], step.positions[rows], self.k)
        scores = self.similarity.of_search(queries, distances, ids)  # (n, k)
        hit = self.values[ids] == targets[rows, None]  # an id of -1 reads the last value, as in the original
        row, column = hit.nonzero(as_tuple=True)
        matched = Entries(rows[row], ids[row, column], scores[row, column])
        votes = self._no_votes(step)
        peak = scores.amax(1)
        votes.peak[rows] = peak
        below = scores - peak[:, None]
        votes.total[rows] = torch.stack([(below * inverse).exp_().sum(1) for inverse in self.inverse_temperatures], 1)
        votes.counts[rows] = self.k
        votes.matched = matched
        return votes

    def _score_entries(self, step: Step, entries: Entries | None, targets: Tensor) -> _Votes:
        """One batched distance computation for the entries that the retriever proposes."""
        if entries is None or not len(entries):
            return self._no_votes(step)
        rows = entries.rows
        scores = self.similarity.of_entries(step.queries, rows, entries.ids)  # (n,)
        votes = self._no_votes(step)
        votes.counts = entries.counts(len(step))
        if kernels.AVAILABLE and self.device.type == "cpu":
            hits = torch.empty(len(scores), dtype=torch.bool)
            inverse = self.inverse_temperatures
            weights = scores.new_zeros(0) if entries.weights is None else entries.weights
            arrays = (scores, entries.ids, self.values, targets, inverse, weights, votes.peak, votes.total, hits)
            kernels.run_by_rows(
                kernels.votes, bounds_of(votes.counts).numpy(), *[array.numpy() for array in arrays]
            )
        else:
            votes.peak.scatter_reduce_(0, rows, scores, "amax")
            below = scores - votes.peak[rows]
            votes.total = _sums_of_exp(below, rows, len(step), self.inverse_temperatures, entries.weights)
            hits = self.values[entries.ids] == targets[rows]
        hit = hits.nonzero().squeeze(1)
        votes.matched = Entries(rows, entries.ids, scores, entries.weights).select(hit)
        return votes

    def _no_votes(self, step: Step) -> _Votes:
        return _Votes(
            torch.full((len(step),), -math.inf, device=self.device),
            torch.zeros(len(step), len(self.inverse_temperatures), device=self.device),
            torch.zeros(len(step), dtype=torch.int64, device=self.device),
            no_entries(self.device),
        )


@dataclass
class _Votes:
    """Candidates of a step, reduced: peak (B,) largest score, total (B, S) sum of exp((score - peak) / T) for each
    temperature, counts (B,) candidates, and the entries whose value is the target."""

    peak: Tensor
    total: Tensor
    counts: Tensor
    matched: Entries

    def total_at(self, peak: Tensor, inverse_temperatures: Tensor) -> Tensor:
        """`total` relative to another, larger peak."""
        factor = ((self.peak - peak)[:, None] * inverse_temperatures).exp_()
        return torch.where(self.counts[:, None] > 0, self.total * factor, 0.0)


def _join(first: Entries, second: Entries) -> Entries:
    """Both, in ascending order of rows."""
    assert first.scores is not None and second.scores is not None
    rows = torch.cat([first.rows, second.rows])
    order = torch.argsort(rows, stable=True)
    ids, scores = torch.cat([first.ids, second.ids]), torch.cat([first.scores, second.scores])
    weights = None
    if first.weights is not None or second.weights is not None:
        parts = (first, second)
        weights = torch.cat([scores.new_ones(len(part)) if part.weights is None else part.weights for part in parts])
    return Entries(rows, ids, scores, weights).select(order)


def _sums_of_exp(
    below: Tensor, rows: Tensor, count: int, inverse_temperatures: Tensor, weights: Tensor | None = None
) -> Tensor:
    """(count, S): sums of exp(below / T), times the weight if any, over the entries of each row; all (n,)."""
    zeros = below.new_zeros(count)
    sums = []
    for inverse in inverse_temperatures:
        terms = (below * inverse).exp_()
        sums.append(zeros.index_add(0, rows, terms if weights is None else terms * weights))
    return torch.stack(sums, 1)


def _log_sum_exp(entries: Entries, rows: int, inverse_temperatures: Tensor) -> Tensor:
    """(rows, S): log of the sum of exp(score / T) per row; minus infinity for a row without entries."""
    assert entries.scores is not None
    peak = torch.full((rows,), -math.inf, device=entries.scores.device)
    peak.scatter_reduce_(0, entries.rows, entries.scores, "amax")
    below = entries.scores - peak[entries.rows]
    total = _sums_of_exp(below, entries.rows, rows, inverse_temperatures, entries.weights)
    return peak[:, None] * inverse_temperatures + total.log()


class _Batch:
    """The tokens of several sequences as flat arrays, longest sequence first, so that those still running at any step
    are a prefix; and the arrays that results go into."""

    def __init__(
        self, sequences: list[ScoredSequence], device: torch.device, temperatures: int, needs: Collection[str] = ()
    ) -> None:
        self.sequences = sequences
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        self.starts = np.cumsum(lengths) - lengths
        self.order = np.argsort(-lengths, kind="stable")
        self.lengths = lengths
        self.device = device
        self.queries = torch.cat([sequence.queries for sequence in sequences]).to(device, torch.float32)
        self.targets = torch.cat([sequence.targets for sequence in sequences]).to(device)
        self.lm_log_probs = torch.cat([sequence.lm_log_probs for sequence in sequences]).to(device, torch.float32)
        self.features = {name: _feature(sequences, name).to(device) for name in sorted(needs)}
        ids = torch.tensor([sequence.sample_id for sequence in sequences])
        self.sample_ids = ids.repeat_interleave(torch.from_numpy(lengths)).to(device)
        positions = np.arange(lengths.sum()) - np.repeat(self.starts, lengths)
        self.positions = torch.from_numpy(positions).to(device)
        count = len(self.targets)
        self.log_probs = torch.zeros(count, device=device)
        self.knn_log_probs = torch.zeros(count, temperatures, device=device)
        self.lmbda = torch.zeros(count, device=device)
        self.searched = torch.zeros(count, dtype=torch.bool, device=device)
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.matched = torch.zeros(count, dtype=torch.int64, device=device)

    def steps(self, sequential: bool, chunk: int) -> Iterator[Tensor]:
        """Flat positions of the tokens of each step: token t of every running sequence, or, when tokens do not depend
        on each other, chunks of all tokens."""
        if not sequential:
            yield from torch.arange(len(self.targets), device=self.device).split(chunk)
            return
        descending = self.lengths[self.order]
        starts = torch.from_numpy(self.starts[self.order]).to(self.device)
        running = np.searchsorted(-descending, -np.arange(descending.max(initial=0)), side="left")
        for position, count in enumerate(running.tolist()):
            yield starts[:count] + position

    def step(self, tokens: Tensor) -> Step:
        """What a retriever may see of these tokens."""
        features = {name: values[tokens] for name, values in self.features.items()}
        return Step(
            self.sample_ids[tokens], self.positions[tokens], self.queries[tokens], self.lm_log_probs[tokens], features
        )

    def store(
        self,
        tokens: Tensor,
        mixed: Tensor,
        knn: Tensor,
        lmbda: Tensor,
        searched: Tensor,
        candidates: Tensor,
        matched: Tensor,
    ) -> None:
        """Keeps the results of a step."""
        self.log_probs[tokens], self.knn_log_probs[tokens], self.lmbda[tokens] = mixed, knn, lmbda
        self.searched[tokens], self.candidates[tokens], self.matched[tokens] = searched, candidates, matched

    def results(self) -> list[RetrievalResult]:
        """One result per sequence; UserError when a log-probability is not a number."""
        if torch.isnan(self.log_probs).any():
            raise UserError("the retrieval produced a value that is not a number; check the datastore and index with k")
        log_probs, knn, lmbda = self.log_probs.cpu(), self.knn_log_probs.cpu(), self.lmbda.cpu()
        searched, candidates, matched = (t.cpu().numpy() for t in (self.searched, self.candidates, self.matched))
        results = []
        for sequence, start, length in zip(self.sequences, self.starts, self.lengths, strict=True):
            span = slice(start, start + length)
            results.append(
                RetrievalResult(
                    sequence.sample_id,
                    log_probs[span],
                    searched[span],
                    candidates[span],
                    matched[span],
                    lmbda[span],
                    knn[span],
                )
            )
        return results


def _feature(sequences: list[ScoredSequence], name: str) -> Tensor:
    """(tokens, ...): a feature of all sequences; UserError when they were scored without it."""
    if not all(name in sequence.features for sequence in sequences):
        raise UserError(
            f"--strategy: found scores without {name}, which this strategy needs; "
            "save them with eval_lm.py --save-scores DIR --save-features"
        )
    return torch.cat([sequence.features[name] for sequence in sequences])


@dataclass
class Stores:
    """What is opened once for any number of KNNLMs: datastore, index, distances, and clusters by path."""

    datastore: Datastore
    index: Index
    similarity: Similarity
    device: torch.device | str = "cpu"
    _clusters: dict[str, Clusters] = field(default_factory=dict)

    def clusters(self, path: str) -> Clusters:
        """The clusters of a members file, read at first use."""
        if path not in self._clusters:
            self._clusters[path] = load_clusters(path, self.datastore.size)
            described = os.path.join(path, CLUSTERS_KIND) if os.path.isdir(path) else path
            check_belongs("--members", described, self.datastore)
            clusters = self._clusters[path]
            logger.info("clusters %s: %d of %d entries", path, clusters.count, len(clusters.members))
        return self._clusters[path]


def open_stores(args: argparse.Namespace, dimension: int, device: torch.device | str = "cpu") -> Stores:
    """Opens the datastore and index that eval_lm's flags name, for queries of width `dimension`."""
    _require_stores(args)
    function = args.knn_sim_func
    datastore = Datastore.open(
        args.dstore_filename,
        args.dstore_size,
        dimension,
        args.dstore_fp16 or None,
        load_keys=not args.no_load_keys and (needs_keys(function, args.faiss_metric_type) or _index_needs_keys(args)),
        in_memory=args.move_dstore_to_mem,
    )
    logger.info("datastore %s: %d entries of dimension %d", args.dstore_filename, datastore.size, dimension)
    if args.knnlm_gpu and torch.device(device).type == "cpu":
        logger.warning("--knnlm-gpu: no GPU is used in this run, so the index is searched on the CPU")
    index = open_index(args.indexfile, datastore, args.probe, device)
    if args.indexfile is not None:
        check_dimension(index.dimension, dimension, args.indexfile)
        check_belongs("--indexfile", args.indexfile, datastore)
    logger.info("index %s: %s", args.indexfile or args.index, index.describe())
    if getattr(args, "index_recall", None) is not None:
        datastore.require_keys("--index-recall")
        if index.inner_product:
            raise BadFlag("--index-recall", "an inner-product index", "one of L2 distances", "drop the flag")
    similarity = build_similarity(function, args.faiss_metric_type, datastore, index)
    if getattr(args, "dstore_weights", False):
        similarity = WeightedSimilarity(similarity, torch.from_numpy(read_weights(datastore)).to(device))
    return Stores(datastore, index, similarity, device)


def _require_stores(args: argparse.Namespace) -> None:
    if args.dstore_filename is None:
        raise BadFlag("--dstore-filename", "nothing", "the prefix of the datastore to use with --knnlm")
    if args.indexfile is None and args.index != EXACT:
        expected = "the index of the datastore to use with --knnlm"
        raise BadFlag("--indexfile", "nothing", expected, "give it, or --index exact")
    if args.indexfile is not None and args.index == EXACT:
        raise BadFlag("--index", "exact beside --indexfile", "one of them", "drop the other")
    if args.probe < 1:
        raise BadFlag("--probe", args.probe, "at least 1")


def _index_needs_keys(args: argparse.Namespace) -> bool:
    recall = getattr(args, "index_recall", None) is not None
    return recall or args.index == EXACT or refinement(args.indexfile) is not None


def strategy_name(args: argparse.Namespace) -> str:
    """The strategy that the flags choose."""
    return args.strategy or ("knnlm" if args.no_pointer else "retomaton")


def build_knnlm(
    args: argparse.Namespace,
    dimension: int,
    device: torch.device | str = "cpu",
    stores: Stores | None = None,
    more_temperatures: Sequence[float] = (),
    searches: SearchCache | None = None,
) -> KNNLM:
    """The KNNLM that eval_lm's flags describe, for queries of width `dimension`; `stores` if they are open already."""
    if stores is None:
        _require_stores(args)
    if not 0 <= args.lmbda <= 1:
        raise BadFlag("--lmbda", args.lmbda, "a number from 0 to 1")
    if args.k < 1:
        raise BadFlag("--k", args.k, "at least 1")
    _warn_of_surprises(args)
    stores = stores or open_stores(args, dimension, device)
    name = strategy_name(args)
    clusters = stores.clusters(args.members) if args.members is not None and name != "knnlm" else None
    resources = Resources(stores.datastore.size, args.k, args.lmbda, clusters, stores.device)
    retriever = RETRIEVER_REGISTRY[name](args, resources)
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
    if args.no_pointer:
        if args.members is not None:
            logger.warning("--members is not used with --no-pointer")
    elif args.min_knns == 0:
        logger.warning("--min-knns 0: the index is never searched, so no token is retrieved; 1 searches least")
    elif args.min_knns < 9999999 and max_knns < args.min_knns:
        said = "--max-knns %d is below --min-knns %d: at least every second token is searched"
        logger.warning(said, max_knns, args.min_knns)
