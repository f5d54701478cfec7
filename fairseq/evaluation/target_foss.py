"""`--target-foss F`: chooses `--min-knns` so that a fraction F of the searches is saved (FoSS), by bisection on a few
thousand tokens, for which the index is searched once. With a larger `--min-knns` there are more searches, so the saved
fraction falls. The largest `--min-knns` that still saves F is chosen, because with more searches predictions are
better."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fairseq.errors import BadFlag, UserError
from fairseq.evaluation.saved_searches import count_saved
from fairseq.knnlm import KNNLM
from fairseq.retrieval.retrievers import Retriever
from fairseq.retrieval.saved.searches import SearchCache
from fairseq.scored_sequences import ScoredSequence

logger = logging.getLogger(__name__)

CLOSE_ENOUGH = 0.001  # the bisection ends when the share exceeds the target by less than this


@dataclass(frozen=True)
class Choice:
    """The chosen `--min-knns`, the true share of searches saved with it, and the number of tokens it was measured
    on."""

    min_knns: int
    share: float
    tokens: int


def needs_choice(knnlm: KNNLM, args: argparse.Namespace) -> bool:
    """Whether `--target-foss` requires a choice of `--min-knns`; BadFlag when the strategy cannot save searches."""
    if args.target_foss is None or knnlm.retriever.meets_target:
        return False
    if not knnlm.retriever.sequential:
        found = f"{args.target_foss} with a strategy that searches for every token"
        raise BadFlag("--target-foss", found, "a strategy that follows pointers", "drop --no-pointer or this flag")
    return True


def first_tokens(sequences: Iterator[ScoredSequence], tokens: int) -> list[ScoredSequence]:
    """Takes sequences from an iterator until they have `tokens` tokens together."""
    taken: list[ScoredSequence] = []
    while sum(map(len, taken)) < tokens and (sequence := next(sequences, None)) is not None:
        taken.append(sequence)
    return taken


def choose_min_knns(
    knnlm: KNNLM, args: argparse.Namespace, sequences: list[ScoredSequence], searches: SearchCache | None = None
) -> Choice:
    """Chooses `--min-knns` for `args.target_foss` on `sequences`, and replaces the retriever of `knnlm` by one with the
    chosen value. searches: saved search results of the sequences, if any. UserError when there are no sequences."""
    if not sequences:
        raise UserError("--target-foss: found no tokens to choose on; check --gen-subset and --target-foss-subset")
    before, resources = knnlm.searches, knnlm.retriever.resources
    strategy, shares = type(knnlm.retriever), {}

    def retriever(min_knns: int) -> Retriever:
        return strategy(argparse.Namespace(**{**vars(args), "min_knns": min_knns}), resources)

    def share(min_knns: int) -> float:
        knnlm.retriever = retriever(min_knns)
        shares[min_knns] = count_saved(result.searched for result in knnlm.score(sequences)).true_share
        logger.info("--min-knns %d saves %.2f%% of the searches", min_knns, 100 * shares[min_knns])
        return shares[min_knns]

    knnlm.searches = searches or SearchCache.of(sequences, knnlm.index, knnlm.k, knnlm.device)
    try:
        chosen = bisect(share, args.target_foss, knnlm.k + (knnlm.k if args.max_knns is None else args.max_knns))
    finally:
        knnlm.searches = before
    knnlm.retriever = retriever(chosen)
    choice = Choice(chosen, shares[chosen], sum(map(len, sequences)))
    if choice.share < args.target_foss:
        said = "--target-foss %g: out of reach; --min-knns 1, the least, saves %.4f of the searches"
        logger.warning(said, args.target_foss, choice.share)
    said = "--target-foss %g: chose --min-knns %d, which saves %.4f of the searches of %d tokens"
    logger.info(said, args.target_foss, chosen, choice.share, choice.tokens)
    return choice


def bisect(share: Callable[[int], float], target: float, most: int) -> int:
    """The largest number n from 1 to `most` with share(n) >= target, for a share that falls with n; 1 when there is
    none. Bisects on a logarithmic scale, because the share depends on the order of magnitude of n."""
    low, high = 1, most + 1
    if share(low) < target:
        return low
    while high - low > 1:
        middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
        saved = share(middle)
        if saved < target:
            high = middle
            continue
        low = middle
        if saved < target + CLOSE_ENOUGH:
            break
    return low
