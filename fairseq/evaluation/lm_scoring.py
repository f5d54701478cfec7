"""The language model's half of an evaluation: from checkpoint and data to scored sequences."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Collection, Iterator
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fairseq import checkpoint_utils, tasks, utils
from fairseq.data import LMContextWindowDataset
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.evaluation.open_models import open_models
from fairseq.evaluation.overrides import read_overrides, warn_of_effectless
from fairseq.key_types import DEFAULT as DEFAULT_KEY_TYPE
from fairseq.key_types import key_type_named
from fairseq.refusals import refuse
from fairseq.scored_sequences import ScoredSequence, contexts
from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)

# The checkpoint's values of these are used, not the command line's: published numbers depend on this.
FROM_CHECKPOINT = ("self_target", "future_target", "past_target", "tokens_per_sample", "add_bos_token")
# The flags that say how windows of `--max-length` are cut, with their defaults.
WINDOWS = {"max_length": None, "stride": None, "drop_remainder": False, "group_documents": None, "rolling": False}


class LMScoring:
    """Models, task, data and batches of one evaluation; iterate `batches()` and pass each to `score`.

    args: eval_lm's flags; features: those of `scored_sequences.FEATURES` that every sequence should have. Public
    attributes: models, task, dataset, effective_args, device, samples (indices in order)."""

    def __init__(self, args: argparse.Namespace, features: Collection[str] = ()) -> None:
        self._load(args, features)
        self.task.load_dataset(args.gen_subset)
        self._warn_of_parts(self._stored)
        self._score_dataset(self.task.dataset(args.gen_subset))
        logger.info("%s %s %d examples", args.data, args.gen_subset, len(self.dataset))

    @classmethod
    def of_models(cls, args: argparse.Namespace, features: Collection[str] = ()) -> LMScoring:
        """Loads only the models and the task, for text that is passed to `on_text`."""
        scoring = cls.__new__(cls)
        scoring._load(args, features)
        return scoring

    def on_text(self, lines: list[torch.Tensor]) -> LMScoring:
        """The same models with other text: lines of token ids (T,), each with its end of line, which are divided into
        samples like a split."""
        other = copy(self)
        task: Any = self.task  # of language modelling
        other._score_dataset(task.samples_of(lines))
        return other

    def _load(self, args: argparse.Namespace, features: Collection[str]) -> None:
        self.args, self.features = args, frozenset(features)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        if args.path is None:
            raise BadFlag("--path", "nothing", "the file of a trained model")
        if args.shard_id >= args.num_shards:
            raise BadFlag("--shard-id", args.shard_id, f"a number below --num-shards {args.num_shards}")
        check_window_flags(args)
        if args.context_window > 0 and args.num_shards > 1:
            raise BadFlag("--num-shards", args.num_shards, "1 with --context-window, whose context crosses shards")
        wants_keys = args.knnlm or args.save_knnlm_dstore or args.save_scores is not None
        if len(folders := utils.split_paths(args.data)) > 1:
            found, expected = f"{len(folders)} folders ({args.data})", "one: training reads one in each epoch, in turn"
            raise BadFlag("data", found, expected, "give one, and run the command once for each")
        overrides = read_overrides(args)
        if wants_keys and args.knn_keytype is None:
            args.knn_keytype = DEFAULT_KEY_TYPE
        if args.knn_keytype is not None:
            key_type_named(args.knn_keytype)
            overrides = {**overrides, "knn_keytype": args.knn_keytype}
        first_task = tasks.setup_task(args)
        self.opened = open_models(args, overrides, first_task)
        self.models, all_args, names = self.opened.models, self.opened.options, self.opened.stored
        self._stored = stored = all_args[-1]  # as in fairseq, the last model's options are used for all
        self._check_stored(all_args)
        warn_of_effectless(overrides, args, names, (*FROM_CHECKPOINT, "knn_keytype"), self.opened.replaceable)
        self.weights = [checkpoint_utils.weights_fingerprint(model) for model in self.models] if wants_keys else []
        self.effective_args = self._effective_args(stored)
        self.task = tasks.setup_task(self.effective_args)
        self._check_targets(stored)
        for model in self.models:
            model.make_generation_fast_()
            if args.fp16 or getattr(args, "bf16", False):
                model.to(torch.float16 if args.fp16 else torch.bfloat16)
            model.to(self.device)
            model.eval()
        logger.info("num. model params: %d", sum(p.numel() for p in self.models[0].parameters()))
        self.scorer = SequenceScorer(self.task.target_dictionary, args.softmax_batch, args, self.features)

    def _score_dataset(self, dataset: Any) -> None:
        args = self.args
        longest = utils.resolve_max_positions(*[model.max_positions() for model in self.models])
        if args.max_length is not None and args.max_length > longest:
            raise BadFlag("--max-length", args.max_length, f"at most the {longest} positions of the model")
        if args.context_window > 0:
            dataset = LMContextWindowDataset(
                dataset, self.effective_args.tokens_per_sample, args.context_window, self.task.source_dictionary.pad()
            )
        self.dataset = dataset
        self._refuse_long_documents(longest)
        self.iterator = self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=self._default_max_tokens(longest) if args.max_tokens is None else args.max_tokens,
            max_sentences=args.max_sentences,
            max_positions=longest,
            ignore_invalid_inputs=True,
            num_shards=args.num_shards,
            shard_id=args.shard_id,
            num_workers=args.num_workers if args.context_window == 0 and args.num_workers > 1 else 0,
        )

    def _default_max_tokens(self, longest: Any) -> int:
        """Tokens of a batch without `--max-tokens`: the model's default, or one sample of up to `longest` tokens."""
        sizes = np.asarray(self.dataset.num_tokens_vec(np.arange(len(self.dataset))), np.int64)
        sizes = sizes[sizes <= np.min(longest)] if longest is not None else sizes
        return max(min(model.default_max_tokens for model in self.models), int(sizes.max(initial=0)))

    def _refuse_long_documents(self, longest: int) -> None:
        """Refuses samples that are longer than a Hugging Face model reads and would be skipped: documents are long
        there, and perplexity would be that of the short ones."""
        sizes = np.asarray(self.dataset.sizes, np.int64)
        if getattr(self.task.source_dictionary, "ends_lines", True) or not (sizes > longest).any():
            return
        found = f"{self.args.sample_break_mode}, with {int((sizes > longest).sum())} samples of more than {longest}"
        expected = f"documents of at most the {longest} tokens that the model reads"
        remedy = "give none, which divides them, or --max-length N --rolling --group-documents 1; --force skips them"
        refuse(BadFlag("--sample-break-mode", f"{found} tokens (the longest: {sizes.max()})", expected, remedy))

    def _effective_args(self, stored: argparse.Namespace) -> argparse.Namespace:
        """The checkpoint's options, overwritten by all command-line values (defaults included) except
        FROM_CHECKPOINT."""
        effective = deepcopy(stored)
        for name, value in vars(self.args).items():
            if name not in FROM_CHECKPOINT:
                setattr(effective, name, value)
        tokens, window = int(effective.tokens_per_sample), self.args.context_window
        given = self.args.tokens_per_sample
        if given not in (1024, tokens, tokens - window):  # the last is in effect: 1536 in the README
            logger.warning(
                "--tokens-per-sample %d is ignored, as in fairseq: the checkpoint says %d; to change it, add "
                "'tokens_per_sample': %d to --model-overrides",
                given,
                tokens,
                given,
            )
        if window >= tokens:
            raise BadFlag(
                "--context-window", window, f"less than the checkpoint's tokens_per_sample of {tokens}",
                "lower it, or raise tokens_per_sample with --model-overrides",
            )
        effective.tokens_per_sample = tokens - window
        return effective

    def _check_stored(self, all_args: list[argparse.Namespace]) -> None:
        """Checks the options that are taken from the checkpoints: BadFile for unusable ones, a warning where the models
        of an ensemble differ."""
        for path, stored in zip(utils.split_paths(self.args.path), all_args, strict=True):
            tokens = getattr(stored, "tokens_per_sample", None)
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                remedy = "set another by --model-overrides"
                raise BadFile(path, f"tokens_per_sample {tokens!r:.80}", "a number of tokens", remedy)
        for name in FROM_CHECKPOINT:
            values = [getattr(stored, name, None) for stored in all_args]
            if any(bool(value) != bool(values[-1]) or (value and value != values[-1]) for value in values):
                logger.warning("--path: the models have %s %s; the last one's counts for all", name, values)

    def _check_targets(self, stored: argparse.Namespace) -> None:
        """BadFile for models that are not made for the targets that the options of the last one name. Warns where the
        command line has other switches of this kind, and the checkpoint's count."""
        path = utils.split_paths(self.args.path)[-1]
        targets = getattr(self.task, "targets", ["future"])
        for model in self.models:
            supported = getattr(model, "supported_targets", {"future"})
            if len(targets) != 1 or not set(targets) <= set(supported):
                found = " and ".join(f"{target}_target" for target in targets)
                expected = "; ".join(f"{target}_target alone" for target in sorted(supported))
                remedy = "set the others to False by --model-overrides"
                raise BadFile(path, f"a model to be evaluated by its option {found}", expected, remedy)
        for name in FROM_CHECKPOINT:
            ours, theirs = getattr(self.args, name, False), getattr(stored, name, False)
            harmless = name in ("tokens_per_sample", "future_target" if targets == ["future"] else "")  # the default
            if harmless or bool(ours) == bool(theirs):
                continue
            if self.opened.replaceable is not None:
                reason = ": a BOS stands where its tokenizer puts one" * (name == "add_bos_token")
                said = "--%s has no effect with a Hugging Face model%s"
                logger.warning(said, name.replace("_", "-"), reason)
            else:
                said = "%s: the checkpoint's %s %s counts, as in fairseq, not the command line's %s; to change it, add "
                logger.warning(said + "'%s': %s to --model-overrides", path, name, theirs, ours, name, bool(ours))

    def _warn_of_parts(self, stored: argparse.Namespace) -> None:
        """Warns when `--gen-subset` has further parts: training reads `train`, `train1`, ... as one text, evaluation
        reads only the split that is named."""
        split, folder = self.args.gen_subset, utils.split_paths(self.args.data)[0]
        further = os.path.join(folder, split + "1")
        if split == getattr(stored, "train_subset", "train") and any(
            os.path.exists(further + ending) for ending in (".idx", "")
        ):
            logger.warning("%s: training read it and its further parts as one text; here they are left out", further)

    @functools.cached_property
    def key_dimension(self) -> int:
        """Width D of the keys, which are those of the first model."""
        eos = torch.tensor([[max(0, self.task.source_dictionary.eos())]])
        net_input = {"src_tokens": eos, "src_lengths": torch.ones(1, dtype=torch.long)}
        (keys,) = self.scorer.keys(self.models, self._on_device({"net_input": net_input, "target": eos}))
        return keys.shape[-1]

    @property
    def windows(self) -> dict[str, Any]:
        """What `--max-length` and the flags beside it say; nothing without them."""
        if self.args.max_length is None:
            return {}
        return {name: getattr(self.args, name) for name in WINDOWS}

    @property
    def convention(self) -> dict[str, Any]:
        """How the text is cut, in the words in which perplexities are compared. context: the least number of tokens
        that a scored token sees, except at the start of a text."""
        args, tokens = self.args, self.effective_args.tokens_per_sample
        before = self.task.source_dictionary[max(0, self.task.source_dictionary.eos())]
        scored: dict[str, Any] = {"first_token": "scored", "remainder": "scored"}
        if args.group_documents is not None:
            scored["texts"] = f"of {args.group_documents} documents"
        if args.rolling:
            windows = {"block": args.max_length, "stride": args.max_length, "context": 1}
            return {**windows, "before_first_token": before, **scored}
        if args.max_length is not None:
            stride = args.max_length if args.stride is None else args.stride
            windows = {"block": args.max_length, "stride": stride, "context": max(1, args.max_length - stride)}
            if stride == args.max_length:
                scored["first_token"] = "not scored, nor that of any window"
            else:
                scored["first_token"] = "not scored"
            if args.drop_remainder:
                scored["remainder"] = f"{self.dataset.dropped} tokens not scored"
            return {**windows, "before_first_token": "nothing", **scored}
        if args.sample_break_mode in (None, "none"):
            samples = {"block": tokens + args.context_window, "stride": tokens}
        else:  # of whole documents, or lines
            before += " (before each sample)" if args.sample_break_mode == "eos" else ""
            samples = {"samples": args.sample_break_mode, "longest_sample": int(np.max(self.dataset.sizes))}
        return {**samples, "context": args.context_window + 1, "before_first_token": before, **scored}

    @property
    def key_module(self) -> str | None:
        """Name of the module whose input keys are, in the first model, whose keys are used; None for models in which
        there is no choice, and for types of keys that are no module's input."""
        collector = getattr(self.models[0].decoder, "collector", None)
        return None if collector is None else collector.module

    @property
    def cut(self) -> str:
        """How the text is cut, in a few words for the log."""
        if self.args.max_length is None:
            tokens = self.effective_args.tokens_per_sample
            return f"samples of up to {tokens} tokens after at least {self.args.context_window} of context"
        found = self.convention
        return f"windows of up to {found['block']} tokens, a scored token after at least {found['context']} of context"

    @property
    def precision(self) -> str:
        """The numbers that the (first) model computes with."""
        return str(next(self.models[0].parameters()).dtype).removeprefix("torch.")

    @property
    def samples(self) -> NDArray[np.int64]:
        """Dataset indices in the order in which they are scored."""
        batches = [batch for batch in self.iterator.frozen_batches if len(batch)]
        if self.args.num_shards > 1:
            batches = batches[self.args.shard_id :: self.args.num_shards]
        return np.concatenate([np.asarray(batch, np.int64) for batch in batches] or [np.zeros(0, np.int64)])

    @property
    def expected_tokens(self) -> int:
        """Number of targets in the samples that are scored, each of which must get a log-probability."""
        return int(np.asarray(self.dataset.sizes, np.int64)[self.samples].sum())

    @property
    def skipped(self) -> NDArray[np.int64]:
        """Dataset indices that are in no batch of any shard: too long, or empty."""
        batched = [np.asarray(batch, np.int64) for batch in self.iterator.frozen_batches if len(batch)]
        return np.setdiff1d(np.arange(len(self.dataset)), np.concatenate(batched or [np.zeros(0, np.int64)]))

    def warn_of_skipped(self) -> None:
        """Warns of samples that are too long for the model, or empty, and are left out."""
        if len(skipped := self.skipped):
            tokens = int(np.asarray(self.dataset.sizes, np.int64)[skipped].sum())
            logger.warning("%d samples (%d tokens) are skipped: %s", len(skipped), tokens, skipped[:10].tolist())

    def batches(self) -> Iterator[dict[str, Any]]:
        """Collated batches in order, on the CPU; empty ones are left out."""
        return (sample for sample in self.iterator.next_epoch_itr(shuffle=False) if "net_input" in sample)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.iterator)

    def score(self, sample: dict[str, Any]) -> list[ScoredSequence]:
        """Runs the LM on a batch. Without a key type the queries are empty (T, 0) tensors."""
        sample, drop = self._on_device(sample), self._dropped
        ids = sample["id"].tolist()
        sequences = []
        for row, (sample_id, hypotheses) in enumerate(zip(ids, self.scorer.generate(self.models, sample), strict=True)):
            best = hypotheses[0]
            targets, scores = best["tokens"][drop:], best["positional_scores"][drop:].float()
            keys = best["queries"]
            queries = scores.new_zeros(len(scores), 0) if keys is None else keys[drop:]
            features: dict[str, torch.Tensor] = {
                name: best[name][drop:].cpu() for name in ("lm_max", "lm_entropy") if name in self.features
            }
            source = sample["net_input"]["src_tokens"][row, : best["start_idx"] + len(best["tokens"])]
            if "context" in self.features:
                features["context"] = contexts(source, self.task.source_dictionary.eos())[-len(scores) :].cpu()
            before = int(source[best["start_idx"] + drop]) if len(scores) else -1
            sequences.append(ScoredSequence(sample_id, queries.cpu(), targets.cpu(), scores.cpu(), features, before))
        self._check(sequences)
        return sequences

    def keys(self, sample: dict[str, Any]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(sample id, targets (T,), keys (T, D)) for each row of a batch, for saving a datastore; no probabilities are
        computed."""
        sample, drop = self._on_device(sample), self._dropped
        ids, pad = sample["id"].tolist(), self.scorer.pad
        rows = zip(ids, sample["target"], self.scorer.keys(self.models, sample), strict=True)
        return [(number, targets[targets != pad][drop:].cpu(), keys[drop:].cpu()) for number, targets, keys in rows]

    def _on_device(self, sample: dict[str, Any]) -> dict[str, Any]:
        return utils.move_to_cuda(sample, self.device) if self.device.type == "cuda" else sample

    @property
    def _dropped(self) -> int:
        """Number of positions at the start of a sample that are not scored."""
        return 1 if getattr(self.effective_args, "add_bos_token", False) else 0

    @staticmethod
    def _check(sequences: list[ScoredSequence]) -> None:
        for sequence in sequences:
            if torch.isnan(sequence.lm_log_probs).any():
                raise UserError(
                    f"sample {sequence.sample_id}: the language model gave a log-probability that is not a number; "
                    "check the checkpoint, or evaluate without --fp16"
                )


def check_window_flags(args: argparse.Namespace) -> None:
    """BadFlag for flags of windows that say nothing without another, or contradict each other."""
    for name in ("stride", "drop_remainder", "group_documents", "rolling"):
        if getattr(args, name) and args.max_length is None:
            flag = "--" + name.replace("_", "-")
            raise BadFlag(flag, "it alone", "--max-length beside it, the length of a window")
    if args.rolling and (args.stride or args.drop_remainder):
        raise BadFlag("--rolling", "--stride or --drop-remainder beside it", "it alone: windows follow each other")
