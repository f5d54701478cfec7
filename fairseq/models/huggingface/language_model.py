"""A causal language model of transformers with the methods of `FairseqLanguageModel`: features without the head, the
head's product in slices of tokens, and the activations that key types are made of."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import BadFlag
from fairseq.key_types import FINAL_HIDDEN
from fairseq.models.fairseq_decoder import FairseqDecoder, NetOutput
from fairseq.models.fairseq_model import FairseqLanguageModel
from fairseq.models.huggingface.activations import Collector, hidden_states
from fairseq.models.huggingface.folders import library
from fairseq.models.huggingface.structure import text_config

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")  # in configurations


CACHE_NAMES = ("past_key_values", "cache")  # of the argument, in versions of transformers


class BaseOutput(tuple):
    """Stands for the output of the network below the head: hidden states, and nothing else."""

    @property
    def last_hidden_state(self) -> Any:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class HuggingFaceDecoder(FairseqDecoder):
    """The network with fairseq's methods. key_type: the key type whose activations are collected; module: name of the
    module whose input is taken for that of the last feed-forward block (found by itself otherwise)."""

    def __init__(self, network: Any, dictionary: Any, key_type: str | None = None, module: str | None = None) -> None:
        super().__init__(dictionary)
        self.network = network
        self.collector = Collector(network, key_type, module)
        self.layers = self.collector.layers
        self._below = [self.collector.below]  # in a list, so that it is no second child
        parameters = inspect.signature(self._below[0].forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._settings = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
        self._takes = set(parameters) | ({"attention_mask"} if takes_any else set())
        self._cache_names = [name for name in CACHE_NAMES if name in parameters]
        self._check_head()

    @torch.no_grad()
    def _check_head(self) -> None:
        """A few tokens through the network as a whole, and through the part below the head and the head: the same, or
        this class does not understand the network."""
        tokens = torch.arange(4, device=next(self.network.parameters()).device)[None]
        whole = self.network(input_ids=tokens).logits.float().log_softmax(-1)
        parts = self.forward(tokens)[0].float().log_softmax(-1)
        if not torch.allclose(whole, parts, atol=0.1, rtol=0.02):
            found = f"{type(self.network).__name__}, whose head is more than its last step"
            raise BadFlag("--path", found, "a model of layers with a head on top", "this family is not supported")
        other = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)  # another last token
        change = (self.network(input_ids=other).logits.float().log_softmax(-1) - whole).abs().amax(-1)[0]
        rounding = 1e-3 if next(self.network.parameters()).dtype == torch.float32 else 0.05
        if change[:-1].max() > rounding * change[-1]:
            found = f"{type(self.network).__name__}, in which a position sees those after it, as in an encoder"
            raise BadFlag("--path", found, "a causal language model", "its numbers would be no probabilities of a text")

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, features_only: bool = False, **kwargs: Any
    ) -> NetOutput:
        """Tokens (B, T) -> (logits (B, T, V), or with `features_only` features (B, T, D); extra); the other arguments
        are those of `extract_features`. extra["features_only"] tells `get_target_log_probs` which they are."""
        features, extra = self.extract_features(prev_output_tokens, **kwargs)
        if features_only:
            return features, {**extra, "features_only": True}
        return self.output_layer(features), extra

    def extract_features(  # type: ignore[override]
        self, prev_output_tokens: Tensor, first_needed: int = 0, incremental_state: Any = None, **kwargs: Any
    ) -> NetOutput:
        """What the head reads, (B, T - first_needed, D), and the activations of the key type. Padding has to stand at
        the right, where a causal model cannot see it; with `incremental_state`, at the left. Then only positions not
        seen before are returned, and computed if the model can keep what it knows of the others."""
        tokens = prev_output_tokens.masked_fill(prev_output_tokens == self.dictionary.pad(), 0)
        settings: dict[str, Any] = self._settings
        if incremental_state is not None:
            settings = settings | self._left_padding(prev_output_tokens)
            first_needed = incremental_state.get("seen", 0)
            incremental_state["seen"] = tokens.shape[1]
            if self._cache_name is not None:
                known = self._known(incremental_state, tokens.shape[1], self.network.config)
                settings |= {self._cache_name: incremental_state["cache"], "use_cache": True}
                if "position_ids" in settings:
                    settings["position_ids"] = settings["position_ids"][:, known:]
                if "attention_mask" in settings and is_recurrent(incremental_state["cache"]):
                    settings["attention_mask"] = settings["attention_mask"][:, known:]  # it looks at no other position
                tokens, first_needed = tokens[:, known:], first_needed - known
        rows, length = tokens.shape
        with self.collector.collecting() as collected:
            output = self._below[0](input_ids=tokens, **settings)
        features = hidden_states(output)
        extra: dict[str, Any] = {"attn": [None], **self.collector.extra(collected, rows, length, first_needed)}
        if "inner_states" in extra:
            extra[FINAL_HIDDEN] = features.transpose(0, 1)[first_needed:]
        return features[:, first_needed:], extra

    @staticmethod
    def _known(state: dict[str, Any], length: int, config: Any) -> int:
        """How many positions the state's cache has, before it gets those up to `length`. It is made where there is
        none, and made anew for a recurrence that would get several at once, which it can only do from the start."""
        cache = state.get("cache")
        if cache is None or (is_recurrent(cache) and length - state["cached"] > 1):
            state |= {"cache": new_cache(config), "cached": 0}
        known = int(state["cached"])
        state["cached"] = length
        return known

    @functools.cached_property
    @torch.no_grad()
    def _cache_name(self) -> str | None:
        """The argument that takes what is known of earlier positions, if the network goes on from it rightly: a few
        tokens are read at once, and in two parts."""
        tokens = torch.arange(6, device=next(self.network.parameters()).device)[None]
        whole = hidden_states(self._below[0](input_ids=tokens, **self._settings))[:, -2:].float()
        for name in self._cache_names:
            cache = new_cache(self.network.config)
            try:
                for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
                    last = self._below[0](input_ids=part, **{name: cache, "use_cache": True})
            except (ValueError, TypeError, AttributeError, IndexError):
                continue
            if torch.allclose(hidden_states(last)[:, -1].float(), whole[:, -1], atol=0.05, rtol=0.05):
                return name
        return None

    def _left_padding(self, tokens: Tensor) -> dict[str, Tensor]:
        """What tells the network of padding before a row's first token."""
        mask = tokens != self.dictionary.pad()
        if bool(mask[:, 0].all()):
            return {}
        if "attention_mask" not in self._takes:
            kind = type(self.network).__name__
            raise BadFlag("--batch-size", f"prompts of unequal length for {kind}", "1: it cannot be told of padding")
        told = {"attention_mask": mask.long()}
        if "position_ids" in self._takes:
            told["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return told

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Rows of the state in another order, or some of them, or copies."""
        if "cache" in incremental_state:
            incremental_state["cache"].reorder_cache(new_order)

    def crop_incremental_state(self, incremental_state: dict[str, Any], count: int) -> None:
        """Forgets the last `count` positions."""
        incremental_state["seen"] -= count
        if "cache" not in incremental_state or not count:
            return
        if getattr(incremental_state["cache"], "is_croppable", True):
            incremental_state["cache"].crop(-count)
            incremental_state["cached"] -= count
        else:
            del incremental_state["cache"], incremental_state["cached"]  # made again from the text

    def output_layer(self, features: Tensor) -> Tensor:
        """Features (..., D) -> logits (..., V), by the network's own forward pass with the part below the head left
        out: so whatever a family does there (scaling, capping, a bias) is done."""
        flat = features.reshape(1, -1, features.shape[-1])
        below: Any = self._below[0]
        before = vars(below).get("forward")  # accelerate's, in a model that is spread over devices
        below.forward = lambda *args, **kwargs: BaseOutput((flat,))
        try:
            tokens = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
            logits = self.network(input_ids=tokens).logits
        finally:
            del below.forward
            if before is not None:
                below.forward = before
        return logits.reshape(*features.shape[:-1], -1)

    def max_positions(self) -> int:
        """The longest input: the model's number of positions, where it has a limit."""
        config = text_config(self.network)
        found = [getattr(config, name, None) for name in POSITIONS]
        return next((number for number in found if isinstance(number, int) and number > 0), 1_000_000)


def new_cache(config: Any) -> Any:
    """What a network remembers of earlier positions, such that the last ones can be forgotten again."""
    cache = library().DynamicCache(config=config)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()  # windows of attention that slide would not give back what they have passed
    return cache


def is_recurrent(cache: Any) -> bool:
    """Whether a cache has states of recurrences alone, and no keys and values of positions."""
    return all(getattr(cache, "is_linear", [False]))


class HuggingFaceLM(FairseqLanguageModel):
    """A causal language model of transformers."""

    supports_features_only = True
    default_max_tokens = 4096  # such models are large: more tokens at a time take memory and give no more speed

    def __init__(self, decoder: HuggingFaceDecoder) -> None:
        super().__init__(decoder)

    def to(self, *args: Any, **kwargs: Any) -> HuggingFaceLM:
        """As of any module, except that a model that `--hf-device-map` has spread over devices stays there."""
        network: Any = self.decoder.network
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or len(set((getattr(network, "hf_device_map", None) or {}).values())) < 2:
            return super().to(*args, **kwargs)
        return self if dtype is None else super().to(dtype)
