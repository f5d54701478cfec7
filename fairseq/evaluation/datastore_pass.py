"""Saving a datastore: one pass of the language model over a text, in which every token with its full left context
becomes an entry. After a kill, the same command continues.

Which tokens are stored: with a context window C, the tokens of samples with exactly C tokens of context, so that the
text's first C tokens are left out and the entries are contiguous text, as in the original; without a window, all
tokens. The original also did not store a short last sample unless a full one was in the same batch, and nothing of
samples of varying length (`eos`, `complete`); neither is reproduced here. The published sizes are still obtained."""

from __future__ import annotations

import argparse
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq import utils
from fairseq.errors import BadFlag, UserError
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.files.fingerprint import file_fingerprint, split_fingerprints, vocabulary_file
from fairseq.retrieval.datastore.provenance import check_query_model
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.flag_conflicts import strategy_name
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.sizes import size_text

logger = logging.getLogger(__name__)


def stored_rows(lengths: NDArray[np.int64], context_window: int, tokens_per_sample: int) -> NDArray[np.int64]:
    """The number of entries of each sample, from the samples' lengths in order: all its tokens, or none.

    A sample is left out if fewer than `context_window` tokens precede it, or if it is so long that its context was
    cut."""
    if context_window == 0:
        return lengths
    before = np.cumsum(lengths) - lengths
    return np.where((before >= context_window) & (lengths <= tokens_per_sample), lengths, 0)


def save_datastore(scoring: LMScoring, args: argparse.Namespace) -> dict[str, Any]:
    """Writes `--dstore-mmap` from the split that `scoring` reads; returns figures for the results file."""
    if args.dstore_mmap is None:
        raise BadFlag("--dstore-mmap", "nothing", "the prefix of the datastore to save")
    if args.num_shards > 1:
        raise BadFlag("--num-shards", args.num_shards, "1 when a datastore is saved")
    samples = scoring.samples
    tokens = scoring.effective_args.tokens_per_sample
    lengths = np.asarray(scoring.dataset.sizes, np.int64)[samples]
    per_sample = dict(zip(samples.tolist(), stored_rows(lengths, args.context_window, tokens).tolist(), strict=True))
    available = sum(per_sample.values())
    scoring.warn_of_skipped()
    if left_out := int(lengths.sum()) - available:
        window = args.context_window
        logger.info("%d tokens are not stored: their context is not --context-window %d long", left_out, window)
    if available == 0:
        raise UserError(
            f"{args.data} {args.gen_subset}: found {lengths.sum()} tokens, none of which has the full context of "
            f"{args.context_window}; lower --context-window or use more text"
        )
    rows = available if args.dstore_size is None else args.dstore_size
    if rows != available:
        logger.warning(
            "--dstore-size %d: the text has %d entries to store; %s",
            rows,
            available,
            "the rest stays zero, as in the original" if rows > available else "the remaining ones are left out",
        )
    identity = scoring_identity(scoring, args)
    value_bytes = getattr(scoring.task.target_dictionary, "value_bytes", 8)
    writer = DatastoreWriter(args.dstore_mmap, rows, scoring.key_dimension, args.dstore_fp16, identity, value_bytes)
    row_bytes = scoring.key_dimension * writer.key_dtype.itemsize + value_bytes
    logger.info(
        "saving %d entries of dimension %d (%s) to %s: %s; key type %s%s",
        rows,
        scoring.key_dimension,
        writer.key_dtype.name,
        args.dstore_mmap,
        size_text(rows * row_bytes),
        args.knn_keytype,
        f"; continuing after {writer.written} entries" if writer.written else "",
    )
    try:
        _fill(scoring, writer, per_sample, args)
        filled = writer.written
        writer.finish(identity)
    finally:
        writer.close()
    logger.info("dstore_idx %d; saved %s_keys.npy, %s_vals.npy and %s.json", filled, *[args.dstore_mmap] * 3)
    return {"dstore_rows": rows, "dstore_filled_rows": filled, "dstore_dimension": scoring.key_dimension}


def _fill(scoring: LMScoring, writer: DatastoreWriter, per_sample: dict[int, int], args: argparse.Namespace) -> None:
    """Runs the LM over the batches that are not stored yet; a batch is written while the next one is computed."""
    position, stored = 0, writer.written  # entries of the samples so far; entries that an earlier run stored
    writing: Future[None] | None = None
    progress = tqdm(
        total=writer.rows, initial=writer.written, unit="entries", unit_scale=True, disable=args.no_progress_bar or None
    )
    with progress, ThreadPoolExecutor(1) as pool:
        for sample in scoring.batches():
            if position >= writer.rows:
                break
            entries = sum(per_sample[number] for number in sample["id"].tolist())
            if entries and position + entries > stored:  # the others give context, or were stored by an earlier run
                keys, values = _entries(scoring, sample, per_sample)
                skip = max(0, stored - position)
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.append, keys[skip:], values[skip:])
                progress.update(min(position + entries, writer.rows) - progress.n)
            position += entries
        if writing is not None:
            writing.result()


def _entries(
    scoring: LMScoring, sample: dict[str, Any], per_sample: dict[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keys (n, D) and values (n,) of those samples of a batch that are stored."""
    kept = []
    for number, targets, keys in scoring.keys(sample):
        if len(targets) != (per_sample[number] or len(targets)):
            raise UserError(
                f"sample {number} has {len(targets)} targets where {per_sample[number]} were expected; "
                "the padding symbol occurs in the text, preprocess it again"
            )
        if per_sample[number]:
            kept.append((keys.to(torch.float32), targets))
    values = torch.cat([targets for _, targets in kept]).numpy()
    assert values.max() < len(scoring.task.target_dictionary)
    return torch.cat([some for some, _ in kept]).numpy(), values


def scoring_identity(scoring: LMScoring, args: argparse.Namespace) -> dict[str, Any]:
    """The identity of a datastore, or of saved scores: model, data, and all flags that affect keys."""
    folder = utils.split_paths(args.data)[0]
    return {
        "models": scoring.opened.files(),
        "weights": scoring.weights,
        "data": split_fingerprints(folder, args.gen_subset),
        "split": args.gen_subset,
        "vocabulary": len(scoring.task.target_dictionary),
        "key_type": args.knn_keytype,
        **({} if scoring.key_module is None else {"key_module": scoring.key_module}),
        "sample_break_mode": args.sample_break_mode or "none",
        "tokens_per_sample": scoring.effective_args.tokens_per_sample,
        "context_window": args.context_window,
        **scoring.windows,
        "max_tokens": args.max_tokens,
        "max_sentences": args.max_sentences,
        "model_overrides": str(args.model_overrides),
        "precision": scoring.precision,
    }


def check_source(scoring: LMScoring, args: argparse.Namespace) -> list[str]:
    """Refuses a datastore of another model, as far as its sidecar says, and files of the strategy that were made for
    another model; returns the names of the properties of the datastore that were compared."""
    dictionary = vocabulary_file(utils.split_paths(args.data)[0])
    info = {
        "weights": scoring.weights,
        "data": {os.path.basename(dictionary): file_fingerprint(dictionary)},
        "vocabulary": len(scoring.task.target_dictionary),
        "key_type": args.knn_keytype,
        "key_module": scoring.key_module,
        "precision": scoring.precision,
    }
    places = [f"--path {args.path}", dictionary, dictionary, "--knn-keytype", "--knn-module"]
    if getattr(args, "knn_module", None) is None:
        places[-1] = f"--path {args.path}, found without --knn-module"
    compared = check_query_model(args.dstore_filename, info, places)
    RETRIEVER_REGISTRY[strategy_name(args)].check_query_model(args, info, places)
    return compared
