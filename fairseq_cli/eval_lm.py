"""`eval_lm.py`: evaluates a language model, alone or with retrieval, or saves a datastore. Parses, calls, reports."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from fairseq import options
from fairseq.datastore_pass import save_datastore
from fairseq.errors import UserError
from fairseq.knnlm import KNNLM, RetrievalResult, build_knnlm
from fairseq.lm_scoring import LMScoring
from fairseq.provenance import write_results
from fairseq.retrieval.savings import SavedSearches
from fairseq.scored_sequences import ScoredSequence
from fairseq.word_accounting import WordAccounting
from fairseq_cli.entry import DATE_FORMAT, LOG_FORMAT, cli_entry

logger = logging.getLogger("fairseq_cli.eval_lm")


class Stopwatch:
    """Seconds spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Evaluation:
    """One pass over a split: counts words, saved searches and seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scoring = LMScoring(args)
        self.knnlm: KNNLM | None = None
        if args.knnlm:
            device = self.scoring.device if args.knnlm_gpu else "cpu"
            self.knnlm = build_knnlm(args, self.scoring.key_dimension, device)
        self.accounting = WordAccounting(
            self.scoring.task.source_dictionary, args.remove_bpe, args.output_word_probs, args.output_word_stats
        )
        self.lm_time, self.retrieval_time = Stopwatch(), Stopwatch()
        self.saved = SavedSearches()
        self.tokens = 0

    def run(self) -> dict[str, Any]:
        """Scores everything, logs fairseq's final lines and returns the figures."""
        if self.knnlm is None:
            for sequence in self._sequences():
                self.accounting.add(sequence.sample_id, sequence.targets.numpy(), sequence.lm_log_probs.numpy())
        else:
            targets: dict[int, Any] = {}
            for result in self._retrieved(self.knnlm, targets):
                self.accounting.add(result.sample_id, targets.pop(result.sample_id), result.log_probs.numpy())
                self.saved.add(result.searched)
        return self._report()

    def _sequences(self) -> Iterator[ScoredSequence]:
        """The LM's part, timed, with progress."""
        progress = tqdm(total=len(self.scoring), unit="batch", disable=self.args.no_progress_bar or None)
        with progress:
            for sample in self.scoring.batches():
                with self.lm_time:
                    sequences = self.scoring.score(sample)
                self.tokens += sample["ntokens"]
                progress.update()
                yield from sequences

    def _retrieved(self, knnlm: KNNLM, targets: dict[int, Any]) -> Iterator[RetrievalResult]:
        """Retrieval's part, timed; fills `targets` with each sample's tokens."""
        group: list[ScoredSequence] = []
        waiting = 0
        for sequence in self._sequences():
            targets[sequence.sample_id] = sequence.targets.numpy()
            if group and waiting + len(sequence) > self.args.lockstep_tokens:
                yield from self._timed(knnlm, group)
                group, waiting = [], 0
            group.append(sequence)
            waiting += len(sequence)
        yield from self._timed(knnlm, group)

    def _timed(self, knnlm: KNNLM, group: list[ScoredSequence]) -> list[RetrievalResult]:
        with self.retrieval_time:
            return knnlm.score(group) if group else []

    def _report(self) -> dict[str, Any]:
        totals = self.accounting.totals
        if totals.count == 0:
            raise UserError(f"{self.args.data} {self.args.gen_subset}: found no tokens to score; check the split")
        seconds = self.lm_time.seconds + self.retrieval_time.seconds
        rate = self.tokens / seconds if seconds else float("inf")
        logger.info(
            "Evaluated %d tokens in %.1fs (%.1f mins) (%.2f tokens/s)", self.tokens, seconds, seconds / 60, rate
        )
        logger.info("Loss (base 2): %.4f, Perplexity: %.2f", totals.loss_base2, totals.perplexity)
        results = {
            "loss_base2": totals.loss_base2,
            "perplexity": totals.perplexity,
            "unit": "token" if self.args.remove_bpe is None else "word",
            "count": totals.count,
            "num_tokens": self.tokens,
            "tokens_per_second": rate,
            "seconds": seconds,
            "lm_seconds": self.lm_time.seconds,
            "context_window": self.args.context_window,
            "tokens_per_sample": self.scoring.effective_args.tokens_per_sample,
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
        self.accounting.log_stats()
        return results


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates or saves, as `args` say; returns the figures that `--results-json` receives."""
    if args.knnlm and args.save_knnlm_dstore:
        raise UserError("--knnlm and --save-knnlm-dstore: found both, expected one; save in a run of its own")
    if args.results_path is not None:
        _log_to_folder(args.results_path)
    logger.info("%s", args)
    results = save_datastore(LMScoring(args), args) if args.save_knnlm_dstore else Evaluation(args).run()
    if args.results_json is not None:
        write_results(args.results_json, results, args)
    return results


def _log_to_folder(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    handler = logging.FileHandler(os.path.join(folder, "eval_lm.log"))
    handler.setFormatter(logging.Formatter(LOG_FORMAT, DATE_FORMAT))
    logging.getLogger().addHandler(handler)


def cli_main() -> None:
    """Console entry point; the log goes to stderr, as in the original."""
    cli_entry(lambda: main(options.parse_args_and_arch(options.get_eval_lm_parser())), sys.stderr)


if __name__ == "__main__":
    cli_main()
