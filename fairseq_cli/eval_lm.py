"""`eval_lm.py`: evaluates a language model, alone or with retrieval, or saves a datastore."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq import options, utils
from fairseq.data.text_description import text_counts
from fairseq.errors import BadFlag, UserError
from fairseq.evaluation.datastore_pass import check_source, save_datastore, scoring_identity
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.evaluation.saved_searches import SavedSearches
from fairseq.evaluation.target_foss import Choice, choose_min_knns, first_tokens, needs_choice
from fairseq.evaluation.text_measures import log_measures, text_measures
from fairseq.evaluation.word_accounting import WordAccounting
from fairseq.evaluation.word_boundaries import check_encoder_flags
from fairseq.files.atomic_io import open_log
from fairseq.files.outputs import LOG, claimed, score_files, stored_files
from fairseq.files.provenance import write_results
from fairseq.knnlm import KNNLM, RetrievalResult, build_knnlm
from fairseq.refusals import refuse
from fairseq.retrieval.flag_conflicts import check_flags, strategy_name
from fairseq.retrieval.index.recall import QuerySample, measure_recall
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval.saved.scores import KIND as SCORES
from fairseq.retrieval.saved.scores import NAMES, ScoreCache, ScoreWriter
from fairseq.retrieval.saved.searches import saved_searches, search_identity
from fairseq.scored_sequences import FEATURES, ScoredSequence, lockstep_groups
from fairseq_cli.entry import DATE_FORMAT, LOG_FORMAT, cli_entry, log_start

logger = logging.getLogger("fairseq_cli.eval_lm")


class Stopwatch:
    """Seconds spent inside its `with` blocks."""

    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = self.clock()

    def __exit__(self, *exception: object) -> None:
        self.seconds += self.clock() - self._started


class Evaluation:
    """One pass over a split: counts words, saved searches and seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scoring = LMScoring(args, self._features())
        self.knnlm: KNNLM | None = None
        if args.knnlm:
            if args.dstore_filename is not None:
                check_source(self.scoring, args)
            device = self.scoring.device if args.knnlm_gpu else "cpu"
            vocabulary = len(self.scoring.task.target_dictionary)
            self.knnlm = build_knnlm(args, self.scoring.key_dimension, device, vocabulary=vocabulary)
        self.accounting = WordAccounting(
            self.scoring.task.source_dictionary,
            args.remove_bpe,
            args.output_word_probs,
            args.output_word_stats,
            getattr(args, "gpt2_encoder_json", None),
        )
        self.preceding: dict[int, int] = {}  # the token before each sample
        self.lm_time, self.retrieval_time = Stopwatch(), Stopwatch()
        self.saved = SavedSearches()
        self.tokens = self.scored = 0
        self.writer = None if args.save_scores is None else ScoreWriter(args.save_scores)
        self.choice: Choice | None = None
        self.sample: QuerySample | None = None
        if args.index_recall is not None and self.knnlm is not None:
            self.sample = QuerySample(args.index_recall, self.scoring.expected_tokens)

    def _features(self) -> frozenset[str]:
        """The features of the LM that the strategy or `--save-features` needs."""
        needs = RETRIEVER_REGISTRY[strategy_name(self.args)].needs if self.args.knnlm else frozenset()
        return needs | (frozenset(FEATURES) if self.args.save_features else frozenset())

    def run(self) -> dict[str, Any]:
        """Scores everything, logs fairseq's final lines and returns the figures."""
        sequences = self._sequences()
        if self.args.save_searches:
            sequences = self._with_saved_searches(sequences)
        if self.knnlm is None:
            for sequence in sequences:
                self._count(sequence.sample_id, sequence.targets.numpy(), sequence.lm_log_probs.numpy())
        else:
            sequences = self._with_target_foss(self.knnlm, sequences)
            targets: dict[int, Any] = {}
            for result in self._retrieved(self.knnlm, sequences, targets):
                self._count(result.sample_id, targets.pop(result.sample_id), result.log_probs.numpy())
                self.saved.add(result.searched)
        if not self.args.save_searches:
            self._finish_scores()
        return self._report()

    def _count(self, sample_id: int, tokens: NDArray[np.int64], log_probs: NDArray[np.float32]) -> None:
        self.accounting.add(sample_id, tokens, log_probs, self.preceding.pop(sample_id))

    def _sequences(self) -> Iterator[ScoredSequence]:
        """The language model's scored sequences, timed, with a progress bar."""
        progress = tqdm(total=len(self.scoring), unit="batch", disable=self.args.no_progress_bar or None)
        with progress:
            for sample in self.scoring.batches():
                with self.lm_time:
                    sequences = self.scoring.score(sample)
                self.tokens += sample["ntokens"]
                progress.update()
                for sequence in sequences:
                    self.scored += len(sequence)
                    self.preceding[sequence.sample_id] = sequence.preceding
                    if self.sample is not None:
                        self.sample.add(sequence.queries)
                    if self.writer is not None:
                        words = self.accounting.counted(sequence.targets.numpy(), sequence.preceding)
                        self.writer.add(sequence, words)
                    yield sequence

    def _finish_scores(self) -> None:
        if self.writer is not None:
            identity = scoring_identity(self.scoring, self.args)
            self.writer.finish({**identity, "remove_bpe": self.args.remove_bpe, "command": sys.argv})
            logger.info("saved the scored sequences in %s", self.args.save_scores)

    def _with_saved_searches(self, sequences: Iterator[ScoredSequence]) -> Iterator[ScoredSequence]:
        """`--save-searches`: first the LM scores everything, then all searches are made at once, then retrieval reads
        both from the files."""
        assert self.knnlm is not None
        for _ in sequences:
            pass
        self._finish_scores()
        scores, knnlm = ScoreCache.open(self.args.save_scores), self.knnlm
        identity = search_identity(self.args, knnlm.index)
        with self.retrieval_time:
            knnlm.searches = saved_searches(
                scores, knnlm.index, knnlm.k, identity, knnlm.device, not self.args.no_progress_bar
            )
        return scores.sequences()

    def _with_target_foss(self, knnlm: KNNLM, sequences: Iterator[ScoredSequence]) -> Iterator[ScoredSequence]:
        """`--target-foss`: chooses `--min-knns` on the first tokens of this split or of another."""
        if not needs_choice(knnlm, self.args):
            return sequences
        subset = self.args.target_foss_subset
        elsewhere = subset not in (None, self.args.gen_subset)
        source = self._of_split(subset) if elsewhere else sequences
        first = first_tokens(source, self.args.target_foss_tokens)
        self.choice = choose_min_knns(knnlm, self.args, first, None if elsewhere else knnlm.searches)
        return sequences if elsewhere else itertools.chain(first, sequences)

    def _of_split(self, split: str) -> Iterator[ScoredSequence]:
        scoring = LMScoring(argparse.Namespace(**{**vars(self.args), "gen_subset": split}), self.scoring.features)
        return itertools.chain.from_iterable(map(scoring.score, scoring.batches()))

    def _retrieved(
        self, knnlm: KNNLM, sequences: Iterator[ScoredSequence], targets: dict[int, Any]
    ) -> Iterator[RetrievalResult]:
        """Retrieval for scored sequences, timed; stores each sample's tokens in `targets`."""
        for group in lockstep_groups(sequences, self.args.lockstep_tokens):
            targets.update((sequence.sample_id, sequence.targets.numpy()) for sequence in group)
            with self.retrieval_time:
                results = knnlm.score(group)
            yield from results

    def _check_counts(self) -> None:
        """UserError unless every target of every scored sample was counted once; logs the unit of the results, and how
        many samples were left out."""
        expected, args = self.scoring.expected_tokens, self.args
        if self.scored != expected:
            refuse(
                UserError(
                    f"{args.data} {args.gen_subset}: found {self.scored} scored tokens, expected the {expected} of the "
                    "samples; the text may contain the padding symbol: preprocess it again, or go on with --force"
                )
            )
        self.scoring.warn_of_skipped()
        logger.info(
            "scored %d tokens, counted per %s (%d); %s",
            self.scored,
            self.accounting.unit,
            self.accounting.totals.count,
            self.scoring.cut,
        )

    def _index_recall(self, sample: QuerySample) -> dict[str, Any]:
        """`--index-recall`: the recall of the index against exact search, for some of the tokens."""
        assert self.knnlm is not None
        recall = measure_recall(self.knnlm.index, self.knnlm.datastore, sample.queries(), self.knnlm.k)
        logger.info("Index: %s at --probe %d", recall, self.args.probe)
        return {**recall.figures(), "probe": self.args.probe}

    def _report(self) -> dict[str, Any]:
        totals = self.accounting.totals
        if totals.count == 0:
            split, left_out = f"{self.args.data} {self.args.gen_subset}", len(self.scoring.skipped)
            if left_out:
                remedy = "give --sample-break-mode none, which divides them, or raise --max-tokens"
                raise UserError(f"{split}: all {left_out} samples are longer than the model or a batch takes; {remedy}")
            raise UserError(f"{split}: found no tokens to score; check the split")
        self._check_counts()
        seconds = self.lm_time.seconds + self.retrieval_time.seconds
        rate = self.tokens / seconds if seconds else float("inf")
        logger.info(
            "Evaluated %d tokens in %.1fs (%.1f mins) (%.2f tokens/s)", self.tokens, seconds, seconds / 60, rate
        )
        logger.info("Loss (base 2): %.4f, Perplexity: %.2f", totals.loss_base2, totals.perplexity)
        results = {
            "loss_base2": totals.loss_base2,
            "perplexity": totals.perplexity,
            "unit": self.accounting.unit,
            "count": totals.count,
            "scored_tokens": self.scored,
            "skipped_samples": len(self.scoring.skipped),
            "num_tokens": self.tokens,
            "tokens_per_second": rate,
            "seconds": seconds,
            "lm_seconds": self.lm_time.seconds,
            "context_window": self.args.context_window,
            "tokens_per_sample": self.scoring.effective_args.tokens_per_sample,
            "sample_break_mode": self.args.sample_break_mode or "none",
        }
        if self.args.knnlm:
            printed, true = 100 * self.saved.printed_share, 100 * self.saved.true_share
            logger.info("Lookups saved: %s%%", printed)
            logger.info("Searches truly saved: %.2f%% of %d tokens", true, self.saved.tokens)
            results |= {
                "retrieval_seconds": self.retrieval_time.seconds,
                "lookups_saved_percent_printed": printed,
                "searches_saved_percent": true,
                "searches": self.saved.searches,
            }
        if self.sample is not None:
            results["index_recall"] = self._index_recall(self.sample)
        if self.choice is not None:
            results["target_foss"] = {
                "min_knns": self.choice.min_knns,
                "saved_percent_when_chosen": 100 * self.choice.share,
                "tokens": self.choice.tokens,
                "split": self.args.target_foss_subset or self.args.gen_subset,
            }
        text = text_counts(os.path.join(utils.split_paths(self.args.data)[0], self.args.gen_subset))
        if text is not None:
            convention = self.scoring.convention
            results["perplexities"] = text_measures(-totals.log_prob, self.scored, text, convention)
            log_measures(results["perplexities"])
        self.accounting.log_stats()
        self.accounting.log_guesses()
        return results


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, or saves a datastore; returns the figures for `--results-json`."""
    if args.knnlm and args.save_knnlm_dstore:
        raise UserError("--knnlm and --save-knnlm-dstore: found both, expected one; save in a run of its own")
    if args.save_features and not args.save_scores:
        raise BadFlag("--save-features", "it alone", "--save-scores DIR beside it")
    if args.index_recall is not None and not args.knnlm:
        raise BadFlag("--index-recall", "it alone", "--knnlm beside it")
    if args.save_searches and not (args.knnlm and args.save_scores):
        raise BadFlag("--save-searches", "it alone", "--knnlm and --save-scores DIR beside it")
    check_encoder_flags(args)
    with contextlib.ExitStack() as stack:
        if args.results_path is not None:
            log = os.path.join(args.results_path, "eval_lm.log")
            stack.enter_context(claimed("--results-path", log, {log: LOG}))
            _log_to(log)
        if args.check:
            from fairseq_cli import doctor  # imported here, because it imports this module

            sys.exit(doctor.run(args))
        stack.enter_context(claimed("--results-json", args.results_json))
        return _evaluate_or_save(args)


def _evaluate_or_save(args: argparse.Namespace) -> dict[str, Any]:
    log_start(logger, args)
    check_flags(args)
    if args.save_knnlm_dstore:
        with claimed("--dstore-mmap", args.dstore_mmap, stored_files(args.dstore_mmap or "")):
            results = save_datastore(LMScoring(args), args)
    else:
        folder = args.save_scores
        scores = None if folder is None else os.path.join(folder, SCORES)
        with claimed("--save-scores", scores, score_files(folder or "", NAMES)):
            results = Evaluation(args).run()
    if args.results_json is not None:
        write_results(args.results_json, results, args)
    return results


def _log_to(path: str) -> None:
    handler = logging.StreamHandler(open_log(path))
    handler.setFormatter(logging.Formatter(LOG_FORMAT, DATE_FORMAT))
    logging.getLogger().addHandler(handler)


def cli_main() -> None:
    """Console entry point; the log goes to stderr, as in the original."""
    goes_on = bool({"--save-knnlm-dstore", "--save-searches"} & set(sys.argv))
    cli_entry(lambda: main(options.parse_args_and_arch(options.get_eval_lm_parser())), sys.stderr, goes_on)


if __name__ == "__main__":
    cli_main()
