"""Adaptive softmax (Grave et al. 2017, https://arxiv.org/abs/1609.04309): a head over the frequent words and
one entry per tail cluster, and a smaller softmax per tail. log p(w) = head[w], or head[cluster of w] + tail[w].

With adaptive input embeddings the output matrices can be the input's own (tied). The state names are fairseq's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.errors import UserError
from fairseq.modules.adaptive_input import AdaptiveInput, close_cutoffs

CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time when only the targets' log-probabilities are needed: 64 MiB


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of at most CHUNK_ELEMENTS / width of `rows` rows."""
    size = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, start + size) for start in range(0, rows, size))


def target_log_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits)[i, target[i]] as (N,) float32, for logits (N, V) and target (N,)."""
    return -F.cross_entropy(logits.float(), target, reduction="none")


class TiedLinear(nn.Module):
    """A bias-free linear layer on a parameter that another module owns, optionally transposed."""

    def __init__(self, weight: nn.Parameter, transpose: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transpose = transpose

    def forward(self, input: Tensor) -> Tensor:
        """(*, in) -> (*, out)."""
        return F.linear(input, self.weight.t() if self.transpose else self.weight)


class TiedHeadModule(nn.Module):
    """The head whose word rows are the embeddings of band 0 and whose cluster rows are its own."""

    _float_tensor: Tensor

    def __init__(self, words: nn.Parameter, input_dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_words, dim = words.shape
        self.out_dim = self.num_words + num_classes
        self.word_proj: nn.Module = TiedLinear(words)
        if dim != input_dim:
            self.word_proj = nn.Sequential(nn.Linear(input_dim, dim, bias=False), self.word_proj)
        self.class_proj = nn.Linear(input_dim, num_classes, bias=False)
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """Logits (*, words + clusters)."""
        return torch.cat([self.word_proj(input), self.class_proj(input)], dim=-1)


class AdaptiveSoftmax(nn.Module):
    """Output layer and softmax in one. `input` is the decoder's output, (..., input_dim).

    `cutoff` are the ascending first ids of the tail clusters; `adaptive_inputs` ties the output matrices to the input
    embeddings, `tie_proj` the tail projections too."""

    version: Tensor

    def __init__(
        self,
        vocab_size: int,
        input_dim: int,
        cutoff: list[int],
        dropout: float,
        factor: float = 4.0,
        adaptive_inputs: AdaptiveInput | None = None,
        tie_proj: bool = False,
    ) -> None:
        super().__init__()
        self.cutoff = close_cutoffs(cutoff, vocab_size, "--adaptive-softmax-cutoff")
        self.vocab_size = vocab_size
        self.input_dim = input_dim
        self.dropout = dropout
        self.factor = factor
        clusters = len(self.cutoff) - 1
        if adaptive_inputs is None:
            self.head: nn.Module = nn.Linear(input_dim, self.cutoff[0] + clusters, bias=False)
        else:
            self.head = TiedHeadModule(adaptive_inputs.weights_for_band(0)[0], input_dim, clusters)
        self.tail = nn.ModuleList(self._make_tail(i, adaptive_inputs, tie_proj) for i in range(clusters))
        for layer in self.modules():  # after all are made: layers draw random numbers when they are made, too
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        self.register_buffer("version", torch.tensor([1]))

    def _make_tail(self, cluster: int, adaptive_inputs: AdaptiveInput | None, tie_proj: bool) -> nn.Sequential:
        output: nn.Module
        projection: nn.Module
        if adaptive_inputs is None:
            dim = int(self.input_dim // self.factor ** (cluster + 1))
            projection = nn.Linear(self.input_dim, dim, bias=False)
            output = nn.Linear(dim, self.cutoff[cluster + 1] - self.cutoff[cluster], bias=False)
        else:
            table, input_projection = adaptive_inputs.weights_for_band(cluster + 1)
            output = TiedLinear(table)
            # The tied projection keeps the input side's orientation (model width x band width) in files.
            projection = TiedLinear(input_projection, transpose=True)
            if not tie_proj:
                projection = nn.Linear(self.input_dim, table.size(1), bias=False)
        return nn.Sequential(projection, nn.Dropout(self.dropout), output)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuses files older than the versioned layout."""
        if f"{name}.version" not in state_dict:
            raise UserError(
                "the checkpoint's adaptive softmax has no version number, so it is too old to be read; "
                "expected one written by fairseq 0.5 or later"
            )

    def adapt_target(self, target: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Splits targets (any shape) over the clusters.

        Returns (targets, rows): targets[0] (N,) are the head's, where a tail word is replaced by its cluster's entry;
        targets[i + 1] are those of tail i, counted from its first word, on the rows rows[i]; None for an empty tail."""
        target = target.reshape(-1)
        head_target = target.clone()
        targets: list[Tensor | None] = [head_target]
        rows: list[Tensor | None] = []
        for i, (low, high) in enumerate(zip(self.cutoff[:-1], self.cutoff[1:])):
            mask = (target >= low) & (target < high)
            head_target[mask] = self.cutoff[0] + i
            index = mask.nonzero().squeeze(1)
            used = index.numel() > 0
            rows.append(index if used else None)
            targets.append(target[index] - low if used else None)
        return targets, rows

    def forward(self, input: Tensor, target: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Logits per cluster and the matching targets, for the training loss; both lists start with the head.

        Logits of a tail exist only for the rows whose target is in it; None for a tail without rows."""
        features = F.dropout(input.reshape(-1, input.size(-1)), p=self.dropout, training=self.training)
        targets, rows = self.adapt_target(target)
        outputs: list[Tensor | None] = [self.head(features)]
        for tail, index in zip(self.tail, rows):
            outputs.append(None if index is None else tail(features.index_select(0, index)))
        return outputs, targets

    def get_log_prob(self, input: Tensor, target: Tensor | None) -> Tensor:
        """Log-probabilities (B, T, vocab_size) in the type of `input` (B, T, input_dim).

        With `target` (B, T), a tail's columns are computed only on the rows whose target is in it; elsewhere they hold
        the cluster's log-probability, which means nothing for single words. Without it the distribution is complete."""
        batch, length, dim = input.shape
        features = input.reshape(-1, dim)
        head = F.log_softmax(self.head(features), dim=-1)
        log_probs = features.new_empty(features.size(0), self.vocab_size)
        log_probs[:, : self.cutoff[0]] = head[:, : self.cutoff[0]]
        rows = self.adapt_target(target)[1] if target is not None else [slice(None)] * len(self.tail)
        for i, (tail, index) in enumerate(zip(self.tail, rows)):
            columns = slice(self.cutoff[i], self.cutoff[i + 1])
            prior = head[:, self.cutoff[0] + i, None]
            log_probs[:, columns] = prior
            if index is not None:
                log_probs[index, columns] = prior[index] + F.log_softmax(tail(features[index]), dim=-1)
        return log_probs.view(batch, length, self.vocab_size)

    def get_target_log_prob(self, input: Tensor, target: Tensor) -> Tensor:
        """log p(target) alone, as (N,) float32, for input (N, input_dim) and target (N,).

        The same numbers as `get_log_prob` gathered at the target, without any tensor as wide as the vocabulary: the
        head in chunks of rows, each tail on its own rows. Sums are float32 even when the model is in half precision."""
        (head_target, *tail_targets), rows = self.adapt_target(target)
        assert head_target is not None
        result = self._cluster_log_prob(self.head, input, head_target, self.cutoff[0] + len(self.tail))
        for i, (index, tail_target) in enumerate(zip(rows, tail_targets)):
            if index is not None and tail_target is not None:
                width = self.cutoff[i + 1] - self.cutoff[i]
                part = self._cluster_log_prob(self.tail[i], input.index_select(0, index), tail_target, width)
                result.index_add_(0, index, part)
        return result

    @staticmethod
    def _cluster_log_prob(cluster: nn.Module, features: Tensor, target: Tensor, width: int) -> Tensor:
        parts = [target_log_softmax(cluster(features[s]), target[s]) for s in row_chunks(len(target), width)]
        return torch.cat(parts) if parts else features.new_zeros(0, dtype=torch.float32)
