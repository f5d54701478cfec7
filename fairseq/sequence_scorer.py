"""Scores a batch: the log-probability of each target token, and the activation that retrieval uses as its key. Several
models are averaged in probability."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.key_types import key_type_named, keys_of

CHUNK_ELEMENTS = 1 << 24  # log-probabilities of whole distributions in memory at a time: 64 MiB in float32


class SequenceScorer:
    """`generate(models, sample)` scores the targets of a batch.

    softmax_batch is accepted for compatibility; only the targets' log-probabilities are computed, in bounded memory.
    features: "lm_max" and "lm_entropy", when requested, are computed from the whole distributions, chunk by chunk."""

    def __init__(
        self,
        tgt_dict: Any,
        softmax_batch: int | None = None,
        args: argparse.Namespace | None = None,
        features: Collection[str] = (),
    ) -> None:
        self.vocabulary = len(tgt_dict)
        self.wants_distributions = bool({"lm_max", "lm_entropy"} & set(features))
        self.pad = tgt_dict.pad()
        self.eos = tgt_dict.eos()
        self.softmax_batch = softmax_batch
        self.key_type = getattr(args, "knn_keytype", None)
        if self.key_type is not None:
            key_type_named(self.key_type)  # says so when there is none of this name

    @torch.no_grad()
    def generate(self, models: list[Any], sample: dict[str, Any], **kwargs: Any) -> list[list[dict[str, Any]]]:
        """One list with one dict for each row of the batch.

        Keys: tokens (t,) the targets without padding; positional_scores (t,) float32 log-probabilities in nats; score,
        their mean; queries and dstore_keys (t, D) activations when a key type is set, else None; start_idx, the number
        of context tokens before; attention and alignment are None; lm_max and lm_entropy (t,) if requested."""
        first = self._first_needed(models, sample)
        outputs: Iterable[Any] = self._outputs(models, sample, first)  # one at a time, unless all are needed twice
        spread = None
        if self.wants_distributions:
            outputs = list(outputs)
            spread = self._distributions(models, outputs)
        target = sample["target"][:, first:]
        scores, activations = self._score_targets(models, outputs, target)
        hypotheses = []
        for row, span in enumerate(self._spans(sample, first)):
            keys = None if activations is None else activations[span, row]
            positional = scores[row, span]
            hypotheses.append(
                [
                    {
                        "tokens": target[row, span],
                        "score": positional.sum() / max(span.stop - span.start, 1),
                        "attention": None,
                        "alignment": None,
                        "positional_scores": positional,
                        "dstore_keys": keys,
                        "queries": keys,
                        "start_idx": first + span.start,
                    }
                ]
            )
            if spread is not None:
                hypotheses[-1][0] |= {"lm_max": spread[0][row, span], "lm_entropy": spread[1][row, span]}
        return hypotheses

    @torch.no_grad()
    def keys(self, models: list[Any], sample: dict[str, Any]) -> list[Tensor]:
        """(t, D) activations of the first model for each row of the batch, as in `generate`, without any score."""
        first = self._first_needed(models[:1], sample)
        (output,) = self._outputs(models[:1], sample, first)
        keys = self._keys(output)
        return [keys[span, row] for row, span in enumerate(self._spans(sample, first))]

    def _keys(self, output: Any) -> Tensor:
        """(T, B, K) keys from a model's output for T positions."""
        assert self.key_type is not None
        return keys_of(self.key_type, output[1], *output[0].shape[:2])

    @staticmethod
    def _first_needed(models: list[Any], sample: dict[str, Any]) -> int:
        """The first position that has a target in any row, or 0 when a model would compute all of them anyway."""
        able = all(getattr(model, "supports_features_only", False) for model in models)
        return min(sample.get("start_indices") or [0]) if able else 0

    def _spans(self, sample: dict[str, Any], first: int) -> list[slice]:
        """Where each row has targets: after its context, before the padding; counted from position `first`."""
        target = sample["target"]
        starts = sample.get("start_indices") or [0] * len(target)
        lengths = target.ne(self.pad).sum(1).tolist()
        return [slice(start - first, start - first + length) for start, length in zip(starts, lengths, strict=True)]

    def score_targets(self, models: list[Any], sample: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """((B, T) float32 log-probabilities of the targets, (T, B, D) key activations of the first model or None)."""
        return self._score_targets(models, self._outputs(models, sample, 0), sample["target"])

    @staticmethod
    def _outputs(models: list[Any], sample: dict[str, Any], first: int) -> Iterator[Any]:
        for model in models:
            if model.training:
                model.eval()
            able = getattr(model, "supports_features_only", False)
            yield model(**sample["net_input"], **({"features_only": True, "first_needed": first} if able else {}))

    def _score_targets(
        self, models: list[Any], outputs: Iterable[Any], target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        total: Tensor | None = None
        activations = None
        for model, output in zip(models, outputs, strict=True):
            scores = model.get_target_log_probs(output, target, self.pad)
            if self.key_type is not None and activations is None:
                activations = self._keys(output)
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None
        return (total if len(models) == 1 else total - math.log(len(models))), activations

    def _distributions(self, models: list[Any], outputs: list[Any]) -> tuple[Tensor, Tensor]:
        """Largest probability and entropy (nats) of the models' whole distribution, each (B, T) float32."""
        shape = outputs[0][0].shape[:2]
        flat = [output[0].reshape(1, -1, output[0].shape[-1]) for output in outputs]
        largest = flat[0].new_empty(shape.numel(), dtype=torch.float32)
        entropy = torch.empty_like(largest)
        step = max(1, CHUNK_ELEMENTS // self.vocabulary)
        for start in range(0, len(largest), step):
            parts = [(rows[:, start : start + step], extra) for rows, (_, extra) in zip(flat, outputs, strict=True)]
            log_probs = whole_log_probs(models, parts)[0]
            largest[start : start + step], entropy[start : start + step] = spread(log_probs)
        return largest.view(shape), entropy.view(shape)


def whole_log_probs(models: Sequence[Any], outputs: Sequence[Any]) -> Tensor:
    """(B, n, V) float32: log-probabilities of all words, nats, averaged in probability over models, from the output of
    each one's forward pass for n positions."""
    total: Tensor | None = None
    for model, (rows, extra) in zip(models, outputs, strict=True):
        if extra.get("features_only") and getattr(model, "adaptive_softmax", None) is None:
            rows = model.output_layer(rows)
        log_probs = model.get_normalized_probs((rows, extra), log_probs=True, sample=None).float()
        total = log_probs if total is None else torch.logaddexp(total, log_probs)
    assert total is not None
    return total if len(models) == 1 else total - math.log(len(models))


def spread(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability and entropy (nats) of distributions, log_probs (..., V)."""
    probabilities = log_probs.exp()
    return probabilities.amax(-1), -(probabilities * log_probs.clamp(min=-1e4)).sum(-1)  # 0 times infinity is 0
