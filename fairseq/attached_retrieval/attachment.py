"""Hooks that put retrieval into a model's own forward pass, and take themselves off again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq.attached_retrieval.histories import Histories
from fairseq.attached_retrieval.texts import FROM_LOGITS, NO_TOKEN
from fairseq.errors import UserError
from fairseq.key_types import keys_of
from fairseq.knnlm import KNNLM
from fairseq.models.huggingface import Collector, text_config

CACHES = ("cache", "past_key_values", "cache_params")  # names of the argument in versions and families
OF_LOSS = ("num_items_in_batch", "shift_labels")  # arguments that the loss takes
PREPARE = "prepare_inputs_for_generation"
_attached: weakref.WeakSet[Any] = weakref.WeakSet()


class NoCache:
    """Stands for the cache of a pass that returned none."""


NO_CACHE = NoCache()


def require_free(model: Any) -> None:
    """UserError where retrieval is attached to the model already."""
    if model in _attached:
        raise UserError(f"{type(model).__name__}: found retrieval attached already, expected none; detach it first")


@dataclass
class Call:
    """One pass of the model. tokens (B, L): the whole history of each row, NO_TOKEN at padding; kept (m,): positions
    among the new ones whose logits are wanted, None for all."""

    tokens: Tensor
    rows: int
    length: int
    labels: Tensor | None
    kept: Tensor | None
    return_dict: bool
    loss_settings: dict[str, Any]


class Attachment:
    """Retrieval attached to a model, from the moment this object is made until `detach`, or the end of its `with`
    block. Then the model is as it was before.

    model: a causal language model of transformers in evaluation mode; collector: of its activations."""

    def __init__(self, model: Any, knnlm: KNNLM, key_type: str, collector: Collector) -> None:
        require_free(model)
        self.model, self.key_type, self.collector = model, key_type, collector
        self.histories = Histories(knnlm, _beginning(model))
        self._needs_all = bool(knnlm.retriever.needs & FROM_LOGITS)
        self._names = list(inspect.signature(model.forward).parameters)
        self._prepared: tuple[Any, Tensor] | None = None
        self._call: Call | None = None
        self._cache: Callable[[], Any] = lambda: NO_CACHE  # what the last pass returned
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:  # takes everything off again where one of them fails
            self._collected = stack.enter_context(collector.collecting())
            stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._after).remove)
            self._watch_generation(stack)
            _attached.add(model)
            stack.callback(_attached.discard, model)
            self._stack = stack.pop_all()

    def detach(self) -> None:
        """Takes retrieval off the model. Does nothing the second time."""
        self._stack.close()
        self.histories.forget()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def take_rows(self, rows: Tensor) -> None:
        """For a decoding loop of one's own that reorders the rows of its cache: row b becomes what row `rows[b]` was.
        (`generate` needs no call of it.)"""
        self.histories.take_rows(rows.cpu())

    # -- what the model is given

    def _watch_generation(self, stack: contextlib.ExitStack) -> None:
        """`generate` prepares each pass from the whole of its rows: they tell each row's history."""
        prepare = getattr(self.model, PREPARE, None)
        if prepare is None:
            return

        @functools.wraps(prepare)
        def watched(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(input_ids, *args, **kwargs)
            mask = kwargs.get("attention_mask")
            whole = mask is None or mask.shape[-1] <= input_ids.shape[1]  # else the mask alone covers what is cached
            self._prepared = (inputs.get("input_ids"), _history(input_ids, mask)) if whole else None
            return inputs

        had = PREPARE in vars(self.model)
        setattr(self.model, PREPARE, watched)
        stack.callback(lambda: setattr(self.model, PREPARE, prepare) if had else delattr(self.model, PREPARE))

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes what the pass is about, and keeps from the model what is done here: the loss."""
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            expected = "input_ids, since retrieval follows tokens"
            raise UserError(f"attached retrieval: found no input_ids (inputs_embeds alone), expected {expected}")
        rows, length = input_ids.shape
        keep = kwargs.get("logits_to_keep", 0)
        positions = torch.arange(length)
        kept = positions[keep.cpu()] if isinstance(keep, Tensor) else positions[-keep:] if keep else None
        if kept is not None and (self._needs_all or not torch.equal(kept, positions[length - len(kept) :])):
            kwargs["logits_to_keep"] = 0
        settings = {name: kwargs[name] for name in OF_LOSS if kwargs.get(name) is not None}
        return_dict = kwargs.pop("return_dict", None)
        self._call = Call(
            self._whole(input_ids, kwargs), rows, length, kwargs.pop("labels", None), kept,
            getattr(model.config, "return_dict", True) if return_dict is None else return_dict, settings,
        )
        return (), {**kwargs, "return_dict": True}

    def _whole(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The whole history of each row, of which `input_ids` (B, n) is the end."""
        prepared, self._prepared = self._prepared, None
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        past, known = _seen(cache), self.histories.tokens
        mask, length = kwargs.get("attention_mask"), input_ids.shape[1]
        if prepared is not None and prepared[0] is not None and torch.equal(prepared[0], input_ids):
            history = prepared[1]
            if history.shape[1] > length or not past:
                return history  # else generate was given the new tokens of a cache alone
        if past is None and cache is self._cache():  # recurrent states, of which nothing tells how many tokens they saw
            past = known.shape[1]
        if past == 0:
            return _history(input_ids, mask)
        flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        new = _history(input_ids, None if flat is None else flat[:, -length:])
        if past is None or known.shape != (len(new), past):
            found = f"a cache of {len(new)} rows and {'unknown' if past is None else past} tokens"
            read = f"one that was filled while it was attached, of {known.shape[0]} rows and {known.shape[1]} tokens"
            raise UserError(f"attached retrieval: found {found}, expected {read}; begin with an empty cache")
        if flat is not None and flat.shape[1] == known.shape[1] + length:
            _require_same_padding(known, flat[:, : known.shape[1]])
        return torch.cat([known, new], 1)

    # -- what it gives

    @torch.no_grad()
    def _after(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        """The output with the mixture's log-probabilities as its logits, and the loss that follows from them."""
        call, self._call = self._call, None
        assert call is not None
        extra = self.collector.extra(self._collected, call.rows, call.length)
        queries = keys_of(self.key_type, extra, call.rows, call.length).transpose(0, 1)  # (B, n, D)
        self._collected.clear()
        log_probs = output.logits.float().log_softmax(-1)
        self.histories.advance(call.tokens, queries.float(), log_probs)
        if call.kept is not None and log_probs.shape[1] != len(call.kept):
            log_probs = log_probs[:, call.kept.to(log_probs.device)]
        fields = {**dict(output), "logits": log_probs}
        if call.labels is not None:
            size = log_probs.shape[-1]
            loss = model.loss_function(logits=log_probs, labels=call.labels, vocab_size=size, **call.loss_settings)
            fields["loss"] = loss
        cache = next((fields[name] for name in CACHES if fields.get(name) is not None), NO_CACHE)
        self._cache = weakref.ref(cache)
        result = type(output)(**fields)
        return result if call.return_dict else result.to_tuple()


def _history(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """input_ids (B, L) on the CPU with NO_TOKEN where the mask (B, L) is 0."""
    tokens = input_ids.detach().cpu().long()
    if mask is None:
        return tokens
    if mask.shape != tokens.shape:
        found = f"an attention_mask of shape {tuple(mask.shape)}"
        raise UserError(f"attached retrieval: found {found}, expected {tuple(tokens.shape)}, one number for each token")
    return tokens.masked_fill(mask.cpu() == 0, NO_TOKEN)


def _beginning(model: Any) -> int:
    """The token that stands before a text: BOS, or EOS where the model has none."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((number for number in found if isinstance(number, int)), 0)


def _seen(cache: Any) -> int | None:
    """How many tokens a cache has; None where it does not tell, as one of recurrent states alone."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def _require_same_padding(tokens: Tensor, mask: Tensor) -> None:
    """UserError unless the mask (B, L) says of the tokens (B, L) that were read what was said when they were."""
    if not torch.equal(mask.cpu() == 0, tokens == NO_TOKEN):
        found = "an attention_mask with other padding than at the pass before"
        remedy = "where rows were reordered, tell it by take_rows"
        raise UserError(f"attached retrieval: found {found}, expected the same rows in the same order; {remedy}")
