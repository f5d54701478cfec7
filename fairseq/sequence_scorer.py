"""Scores a batch: the log-probability of each target token, and the activation that retrieval uses as its key. Several
models are averaged in probability."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import BadFlag

KEY_TYPES = ("last_ffn_input",)


class SequenceScorer:
    """`generate(models, sample)` scores the targets of a batch.

    softmax_batch is accepted for compatibility; only the targets' log-probabilities are computed, in bounded memory."""

    def __init__(self, tgt_dict: Any, softmax_batch: int | None = None, args: argparse.Namespace | None = None) -> None:
        self.pad = tgt_dict.pad()
        self.eos = tgt_dict.eos()
        self.softmax_batch = softmax_batch
        self.key_type = getattr(args, "knn_keytype", None)
        if self.key_type is not None and self.key_type not in KEY_TYPES:
            raise BadFlag("--knn-keytype", self.key_type, "last_ffn_input")

    @torch.no_grad()
    def generate(self, models: list[Any], sample: dict[str, Any], **kwargs: Any) -> list[list[dict[str, Any]]]:
        """One list with one dict for each row of the batch.

        Keys: tokens (t,) the targets without padding; positional_scores (t,) float32 log-probabilities in nats; score,
        their mean; queries and dstore_keys (t, D) activations when a key type is set, else None; start_idx, the number
        of context tokens before; attention and alignment are None."""
        scores, activations = self.score_targets(models, sample)
        target = sample["target"]
        starts = sample.get("start_indices") or [0] * len(target)
        lengths = target.ne(self.pad).sum(1).tolist()
        hypotheses = []
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            span = slice(start, start + length)
            keys = None if activations is None else activations[span, row]
            positional = scores[row, span]
            hypotheses.append(
                [
                    {
                        "tokens": target[row, span],
                        "score": positional.sum() / max(length, 1),
                        "attention": None,
                        "alignment": None,
                        "positional_scores": positional,
                        "dstore_keys": keys,
                        "queries": keys,
                        "start_idx": start,
                    }
                ]
            )
        return hypotheses

    def score_targets(self, models: list[Any], sample: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """((B, T) float32 log-probabilities of the targets, (T, B, D) key activations of the first model or None)."""
        total: Tensor | None = None
        activations = None
        for model in models:
            if model.training:
                model.eval()
            features_only = {"features_only": True} if getattr(model, "supports_features_only", False) else {}
            output = model(**sample["net_input"], **features_only)
            scores = model.get_target_log_probs(output, sample["target"], self.pad)
            if self.key_type is not None and activations is None:
                activations = output[1][self.key_type]
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None
        return (total if len(models) == 1 else total - math.log(len(models))), activations
