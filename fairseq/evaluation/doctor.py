"""The doctor: examines checkpoint, dictionary, text, datastore, index and clusters together, as `eval_lm.py` would use
them, and says in plain sentences what is wrong or suspicious. Without it, a wrong flag or a file of another model may
only show as a plausible but wrong perplexity. It reads samples, so it takes minutes where an evaluation takes an
hour."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairseq import refusals
from fairseq.errors import UserError
from fairseq.evaluation import datastore_checks
from fairseq.evaluation.datastore_checks import OK, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fairseq.evaluation.datastore_pass import check_source, stored_rows
from fairseq.evaluation.lm_scoring import WINDOWS, LMScoring
from fairseq.knnlm import Stores, build_knnlm, open_stores
from fairseq.retrieval.datastore import Datastore, keys_path
from fairseq.retrieval.index.open_index import open_index
from fairseq.scored_sequences import ScoredSequence

logger = logging.getLogger(__name__)

SAMPLED_TOKENS = 4096
LOOK_AHEAD = 200  # number of batches of the stored text from which samples are drawn
MOST_BATCHES, FEWEST_BATCHES = 16, 4  # of these that are drawn: as many as have about four times SAMPLED_TOKENS
KEY_TOLERANCE = 2e-2  # relative; float16 rounds to 1e-3, and other batch shapes and devices add to the error
MOST_OFF = 0.01  # share of keys that may have a larger error
ALIGNMENT = 64
LAMBDAS = np.linspace(0, 0.9, 19)
WORTH_SAYING = 0.05  # bits per token: 3.5% of the perplexity


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings about the files that `args` (eval_lm's flags) name. Mistakes of the user become findings too."""
    try:
        scoring = LMScoring(args)
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    vocabulary = len(scoring.task.source_dictionary)
    text = f"the model and the dictionary have {vocabulary} words each; {len(scoring.dataset)} samples to score"
    yield Finding(OK, text)
    skipped = len(scoring.skipped)
    if skipped:
        yield Finding(SUSPICIOUS, f"{skipped} samples of {args.gen_subset} are too long and would be left out")
    try:
        first = list(_first(scoring))
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    yield from _of_model(args, scoring, first)
    if args.dstore_filename is None:
        yield Finding(UNKNOWN, "no datastore is named (--dstore-filename), so only the model was looked at")
        return
    if getattr(args, "knnlm_missing", False):
        text = "--knnlm is missing: eval_lm.py would evaluate the model alone, whatever the other flags say"
        yield Finding(SUSPICIOUS, f"{text}; what follows is as if it were given")
    yield from _of_source(args, scoring)
    try:
        stores = open_stores(args, scoring.key_dimension)
        stores.datastore = _with_keys(args, scoring.key_dimension, stores.datastore)
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    yield from _of_stores(args, stores, vocabulary)
    if args.members is not None:
        yield from _of_clusters(args, stores)
    yield from _of_text(args, scoring, stores)
    yield from _of_keys(args, stores, scoring)
    try:
        yield from _of_lambda(args, scoring, stores, first)
    except UserError as error:
        yield Finding(WRONG, str(error))


def _with_keys(args: argparse.Namespace, dimension: int, opened: Datastore) -> Datastore:
    """The datastore with its keys, if their file exists, even if the flags say not to load them."""
    if opened.keys is not None or not os.path.exists(keys_path(args.dstore_filename)):
        return opened
    return Datastore.open(args.dstore_filename, args.dstore_size, dimension, args.dstore_fp16 or None)


def _of_source(args: argparse.Namespace, scoring: LMScoring) -> Iterator[Finding]:
    """Whether the datastore was saved with this model and dictionary, as far as its sidecar says."""
    before = len(refusals.forced())
    try:
        compared = check_source(scoring, args)
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    if not compared:
        text = f"{args.dstore_filename} has no sidecar that says which model and dictionary it was saved with"
        yield Finding(UNKNOWN, text)
    elif len(refusals.forced()) == before:
        yield Finding(OK, f"the datastore was saved with this model and dictionary (compared: {', '.join(compared)})")


def _of_model(args: argparse.Namespace, scoring: LMScoring, first: list[ScoredSequence]) -> Iterator[Finding]:
    """Whether the model predicts this text better than word frequencies do. This detects a dictionary of the right
    length with its words in another order."""
    targets = np.concatenate([*(sequence.targets.numpy() for sequence in first), np.zeros(0, np.int64)])
    if not len(targets):
        yield Finding(UNKNOWN, f"{args.gen_subset} has no tokens on which the model could be tried")
        return
    lm = np.concatenate([sequence.lm_log_probs.double().numpy() for sequence in first])
    dictionary = scoring.task.target_dictionary
    counts = np.maximum(np.asarray(dictionary.count, np.float64), 1)
    frequencies = np.zeros(max(len(dictionary), int(targets.max()) + 1)) + 1
    frequencies[: len(counts)] = counts
    by_count = float(-np.log2(frequencies[targets] / frequencies.sum()).mean())
    loss, uniform = _loss(lm, lm, 0.0), float(np.log2(len(dictionary)))
    sample = f"on the first {len(targets)} tokens of {args.gen_subset}"
    text = f"the model has perplexity {2**loss:.2f} {sample}"
    if not loss < uniform:
        text += f", worse than guessing among the {len(dictionary)} words"
        yield Finding(WRONG, text + ": the dictionary's words are in another order than the model's, or other words")
    elif loss > by_count:
        text += f", where the dictionary's frequencies of words have {2**by_count:.2f}"
        yield Finding(SUSPICIOUS, text + ": check the dictionary, the data and --path")
    else:
        yield Finding(OK, text)


def _of_stores(args: argparse.Namespace, stores: Stores, vocabulary: int) -> Iterator[Finding]:
    datastore, index = stores.datastore, stores.index
    yield from datastore_checks.check_values(datastore, vocabulary)
    yield from datastore_checks.check_keys(datastore)
    yield from datastore_checks.check_index(index, datastore)
    if torch.cuda.is_available():
        device = open_index(args.indexfile, datastore, args.probe, torch.device("cuda"))
        yield from datastore_checks.check_devices(index, device, datastore)
    else:
        yield Finding(UNKNOWN, "no GPU is here, so a search on it is not compared with one on the CPU")


def _of_clusters(args: argparse.Namespace, stores: Stores) -> Iterator[Finding]:
    try:
        yield from datastore_checks.check_clusters(stores.clusters(args.members), stores.datastore.filled)
    except UserError as error:
        yield Finding(WRONG, str(error))


def _tokens(scoring: LMScoring, count: int) -> NDArray[np.int64]:
    """The first `count` targets of a split, in the order of its text."""
    parts, total = [], 0
    for number in range(len(scoring.dataset)):
        sample = scoring.task.dataset(scoring.args.gen_subset)[number]
        parts.append(sample["target"][sample.get("start", 0) :].numpy())  # what stands before is context
        total += len(parts[-1])
        if total >= count:
            break
    return np.concatenate([*parts, np.zeros(0, np.int64)])[:count].astype(np.int64)


def _of_text(args: argparse.Namespace, scoring: LMScoring, stores: Stores) -> Iterator[Finding]:
    if args.gen_subset == stores.datastore.info.get("split"):
        yield Finding(SUSPICIOUS, f"{args.gen_subset} is evaluated, and is what the datastore was saved from")
        return
    text = _tokens(scoring, 1 << 20)
    yield from datastore_checks.check_overlap(stores.datastore.values, text, f"the text of {args.gen_subset}")


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def _of_keys(args: argparse.Namespace, stores: Stores, scoring: LMScoring) -> Iterator[Finding]:
    """Whether the model reproduces the stored keys at sampled positions of the stored text. The flags with which they
    were saved are read from the sidecar; without it, the given flags and the other `--sample-break-mode`s are tried."""
    if stores.datastore.keys is None:
        yield Finding(UNKNOWN, "the keys were not made again, as they were not opened")
        return
    info = stores.datastore.info
    split, mode = info.get("split") or "train", info.get("sample_break_mode")
    if mode or args.max_length is not None:  # windows of --max-length are not cut by modes
        modes = [mode or args.sample_break_mode]
    else:
        modes = list(dict.fromkeys([args.sample_break_mode or "none", "none", "complete", "eos"]))
    tried: list[_Comparison] = []
    for mode in modes:
        given = argparse.Namespace(**{**vars(args), "sample_break_mode": mode})
        try:
            window = info.get("context_window")
            if window is None:
                window = _left_out(given, split, stores.datastore.values)
            if window is not None:
                tried.append(_compare(_saving(given, info, split, int(window), scoring), stores, mode))
        except UserError as error:
            how = f" with --sample-break-mode {mode}" if len(modes) > 1 else ""
            yield Finding(SUSPICIOUS, f"the keys could not be made again{how}: {error}")
        if tried and tried[-1].matches:
            break
    if not tried:
        text = f"the stored values are not the beginning of {split}, so the keys were not made again"
        yield Finding(SUSPICIOUS, text)
        return
    yield from min(tried, key=lambda one: (not one.matches, one.others, one.far)).findings(len(modes) > 1)


def _left_out(args: argparse.Namespace, split: str, values: NDArray[Any]) -> int | None:
    """The number of tokens at the start of the text without an entry, which is the context window of a datastore
    without a sidecar; None when its values are not this text."""
    plain = argparse.Namespace(**{**vars(args), "gen_subset": split, "context_window": 0})
    tokens = _tokens(LMScoring(plain), 1 << 14)
    wanted = np.asarray(values[:ALIGNMENT], np.int64)
    if len(tokens) < len(wanted):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    hits = np.flatnonzero((windows == wanted).all(1))
    return int(hits[0]) if len(hits) else None


def _saving(
    args: argparse.Namespace, info: dict[str, Any], split: str, window: int, scoring: LMScoring
) -> LMScoring:
    """The pass of the language model that saved the datastore, with the flags in its sidecar, as far as they are
    there."""
    block = info.get("tokens_per_sample")
    overrides = f"{{'tokens_per_sample': {int(block) + window}}}" if isinstance(block, int) else args.model_overrides
    known = "context_window" in info
    windows = {name: info.get(name, default) for name, default in WINDOWS.items()} if known else {}
    changes = {
        **windows,
        "gen_subset": split,
        "context_window": window,
        "sample_break_mode": info.get("sample_break_mode") or args.sample_break_mode,
        "model_overrides": overrides,
        "max_tokens": info.get("max_tokens") or args.max_tokens,
        "max_sentences": info.get("max_sentences"),
        "knn_keytype": info.get("key_type") or args.knn_keytype,
        "knn_module": info.get("key_module") or getattr(args, "knn_module", None),
    }
    return LMScoring(argparse.Namespace(**{**vars(args), **changes}))


@dataclass
class _Comparison:
    """The comparison of `compared` entries with the model's keys for samples of the break mode `mode`. others: number
    of entries with another value than the text; far: share of keys with a large error; typical: median error of a
    key."""

    mode: str
    compared: int
    others: int
    far: float
    typical: float

    @property
    def matches(self) -> bool:
        return self.compared > 0 and not self.others and self.far <= MOST_OFF

    def findings(self, was_tried: bool) -> Iterator[Finding]:
        """The findings of this comparison; was_tried: whether other break modes were tried as well."""
        if not self.compared:
            yield Finding(UNKNOWN, "no stored key was made again, as no sampled batch has entries")
            return
        how = f" with --sample-break-mode {self.mode}" if was_tried else ""
        if self.others:
            text = f"{self.others} of {self.compared} stored values are not the tokens of the text that they should"
            yield Finding(WRONG, f"{text} come from{how}: other data, order or size of samples")
        if self.far > MOST_OFF:
            share = f"{100 * self.far:.0f}% of {self.compared} stored keys"
            text = f"the model does not reproduce {share} (typically {100 * self.typical:.1f}% off){how}"
            yield Finding(WRONG, text + ", nor in the other ways of cutting the text" * was_tried
                          + ": another checkpoint, key type or context")
        elif not self.others:
            typical = f"typically {100 * self.typical:.2f}% off"
            yield Finding(OK, f"the model reproduces {self.compared} stored keys ({typical}){how}")


def _compare(saved: LMScoring, stores: Stores, mode: str) -> _Comparison:
    samples, tokens = saved.samples, saved.effective_args.tokens_per_sample
    lengths = np.asarray(saved.dataset.sizes, np.int64)[samples]
    entries = dict(zip(samples.tolist(), stored_rows(lengths, saved.args.context_window, tokens).tolist()))
    keys, values = stores.datastore.require_keys("looking at them"), stores.datastore.values
    per_batch = max(1, saved.expected_tokens // max(1, len(saved)))
    batches = min(MOST_BATCHES, max(FEWEST_BATCHES, 4 * SAMPLED_TOKENS // per_batch))
    chosen = set(datastore_checks.sampled_rows(min(len(saved), LOOK_AHEAD), batches).tolist())
    position, compared, others = 0, 0, 0
    apart = [np.zeros(0, np.float32)]
    for number, batch in enumerate(saved.batches()):
        if number >= LOOK_AHEAD or position >= len(values):
            break
        if number not in chosen:
            position += sum(entries[sample] for sample in batch["id"].tolist())
            continue
        for sequence in saved.score(batch):
            count = min(entries[sequence.sample_id], len(values) - position)
            rows = slice(position, position + count)
            position += count
            if not count:
                continue
            stored = torch.from_numpy(np.asarray(keys[rows], np.float32))
            mine = sequence.queries[:count].float()
            apart.append(((mine - stored).norm(dim=1) / mine.norm(dim=1).clamp(min=1e-6)).numpy())
            others += int((sequence.targets[:count].numpy() != values[rows]).sum())
            compared += count
    off = np.concatenate(apart)
    far = float((~(off <= KEY_TOLERANCE)).mean()) if compared else 0.0
    return _Comparison(mode, compared, others, far, float(np.median(off)) if compared else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Lambda


def _of_lambda(
    args: argparse.Namespace, scoring: LMScoring, stores: Stores, first: list[ScoredSequence]
) -> Iterator[Finding]:
    """Whether `--lmbda` suits the text, on its first tokens; the loss for every lambda is computed from one search."""
    knnlm = build_knnlm(args, scoring.key_dimension, "cpu", stores)
    lm, knn = [], []
    if not first:
        yield Finding(UNKNOWN, f"--lmbda is not tried, as {args.gen_subset} has no tokens to score")
        return
    for sequence in first:
        lm.append(sequence.lm_log_probs.double().numpy())
        (result,) = knnlm.score([sequence])
        knn.append(result.knn_log_probs.double().numpy())
    lm_log_probs, knn_log_probs = np.concatenate(lm), np.concatenate(knn)
    losses = np.array([_loss(lm_log_probs, knn_log_probs, weight) for weight in LAMBDAS])
    given, best = _loss(lm_log_probs, knn_log_probs, args.lmbda), int(losses.argmin())
    sample = f"on the first {len(lm_log_probs)} tokens of {args.gen_subset}"
    if given > losses[0] + WORTH_SAYING / 5:
        text = f"--lmbda {args.lmbda:g} makes it worse than the model alone {sample}"
        yield Finding(WRONG, f"{text}: {2**given:.2f} against {2 ** losses[0]:.2f}")
    elif given >= losses[0] and args.lmbda > 0:
        text = f"--lmbda {args.lmbda:g} is no better than the model alone {sample}"
        yield Finding(SUSPICIOUS, f"{text}: perplexity {2**given:.2f} against {2 ** losses[0]:.2f}")
    elif given > losses[best] + WORTH_SAYING:
        text = f"--lmbda {args.lmbda:g} gives perplexity {2**given:.2f} {sample}, {LAMBDAS[best]:.2f} would give"
        yield Finding(SUSPICIOUS, f"{text} {2 ** losses[best]:.2f}")
    else:
        text = f"--lmbda {args.lmbda:g} suits: perplexity {2**given:.2f} {sample}"
        yield Finding(OK, f"{text}, {2 ** losses[0]:.2f} without retrieval")


def _first(scoring: LMScoring) -> Iterator[ScoredSequence]:
    total = 0
    for batch in scoring.batches():
        for sequence in scoring.score(batch):
            if len(sequence):
                yield sequence
                total += len(sequence)
        if total >= SAMPLED_TOKENS:
            return


def _loss(lm: NDArray[np.float64], knn: NDArray[np.float64], weight: float) -> float:
    """Bits per token of the mixture."""
    if weight == 0:
        return float(-lm.mean() / np.log(2))
    mixed = np.logaddexp(np.log1p(-weight) + lm, np.log(weight) + knn) if weight < 1 else knn
    return float(-mixed.mean() / np.log(2))
