"""Bases of models: the interface that criteria, scorer and trainer use, and loading of state dicts.

A model that was built on the meta device (no memory) takes its parameters from the state dict it loads; that is how
evaluation keeps the peak memory near the size of the weights."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.errors import UserError
from fairseq.models.fairseq_decoder import FairseqDecoder, NetOutput
from fairseq.modules.adaptive_softmax import row_chunks, target_log_softmax


class ArchitectureMismatch(UserError):
    """A state dict that does not fit the model."""


class BaseFairseqModel(nn.Module):
    """Extend it, register it with `register_model`, and give it `build_model` and `forward`.

    supports_features_only: whether `forward` takes features_only=True, leaves the output layer out then, and
    `get_target_log_probs` works from the features; scoring uses it to make no tensor as wide as the vocabulary. Such a
    `forward` also takes first_needed=n, and leaves out what is only needed for the outputs of the first n positions. A
    subclass whose `forward` does not take both sets it back to False.

    default_max_tokens: the most tokens of a batch in evaluation, unless `--max-tokens` says otherwise; fairseq's."""

    supports_features_only = False
    default_max_tokens = 36000

    def __init__(self) -> None:
        super().__init__()
        self._is_generation_fast = False

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the model's flags to an argparse group whose defaults are suppressed."""

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> Any:
        """The model for `args`; to be defined by each model."""
        raise TypeError(f"{cls.__name__} must define build_model")

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """Names of published models and where they come from."""
        return {}

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, checkpoint_file: str = "model.pt", data_name_or_path: str = ".", **kwargs: Any
    ) -> Any:
        """A ready-to-use model from a folder; see `fairseq.hub_utils.from_pretrained`. `kwargs` override its args."""
        hub_utils: Any = importlib.import_module("fairseq.hub_utils")  # it imports the models in turn

        loaded = hub_utils.from_pretrained(
            model_name_or_path, checkpoint_file, data_name_or_path, archive_map=cls.hub_models(), **kwargs
        )
        return hub_utils.GeneratorHubInterface(loaded["args"], loaded["task"], loaded["models"])

    def get_targets(self, sample: dict[str, Any], net_output: Any) -> Tensor:
        """The targets (B, T) of a batch."""
        return sample["target"]

    def get_normalized_probs(self, net_output: NetOutput, log_probs: bool, sample: Any = None) -> Tensor:
        """(Log-)probabilities (B, T, V); see `FairseqDecoder.get_normalized_probs`."""
        decoder = getattr(self, "decoder", None)
        if not isinstance(decoder, FairseqDecoder):
            raise TypeError(f"{type(self).__name__} must define get_normalized_probs")
        return decoder.get_normalized_probs(net_output, log_probs, sample)

    def max_positions(self) -> Any:
        """The longest input; None for no limit."""
        return None

    def upgrade_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Brings a state dict written by another version to this one's names, in place."""
        self.upgrade_state_dict_named(state_dict, "")

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Asks every submodule that has a method of this name, outer ones first."""
        for path, module in list(self.named_modules()):
            if module is not self and hasattr(module, "upgrade_state_dict_named"):
                module.upgrade_state_dict_named(state_dict, f"{name}.{path}" if name else path)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, args: argparse.Namespace | None = None
    ) -> None:
        """Loads `state_dict`, pruned when `args.decoder_layers_to_keep` says so and upgraded; the dict stays as it is.
        Its values are copied, unless the model is on the meta device: then it takes the tensors themselves.

        Strict loading raises ArchitectureMismatch, before anything is copied, naming keys or shapes that differ."""
        state = dict(state_dict)
        self.prune_state_dict(state, args)
        self.upgrade_state_dict(state)
        if strict:
            check_state_dict(self, state)
        if any(tensor.is_meta for tensor in [*self.parameters(), *self.buffers()]):
            _materialise(self, state)
        else:
            super().load_state_dict(state, strict=strict)
        if args is not None and getattr(args, "decoder_layers_to_keep", None):
            args.decoder_layers_to_keep = None  # a file saved from here on holds the pruned model

    def prune_state_dict(self, state_dict: dict[str, Any], args: argparse.Namespace | None) -> None:
        """Keeps the decoder layers listed in `args.decoder_layers_to_keep` ("0,2,4") and renumbers them (LayerDrop)."""
        listed = getattr(args, "decoder_layers_to_keep", None)
        if not listed:
            return
        prefix = "decoder.layers."
        kept = {old: new for new, old in enumerate(sorted(int(layer) for layer in str(listed).split(",")))}
        layers = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        for key, value in layers.items():
            number, rest = key[len(prefix) :].split(".", 1)
            if int(number) in kept:
                state_dict[f"{prefix}{kept[int(number)]}.{rest}"] = value

    def make_generation_fast_(self, **kwargs: Any) -> None:
        """Prepares for inference, irreversibly: evaluation mode, and the methods of this name of all submodules."""
        if self._is_generation_fast:
            return
        self.eval()
        self._is_generation_fast = True
        for module in self.modules():
            if module is not self and hasattr(module, "make_generation_fast_"):
                module.make_generation_fast_(**kwargs)  # type: ignore[operator]

    def prepare_for_inference_(self, cfg: Any = None) -> None:
        """The newer name of `make_generation_fast_`."""
        self.make_generation_fast_()

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode; RuntimeError for training after `make_generation_fast_`."""
        if mode and getattr(self, "_is_generation_fast", False):
            raise RuntimeError("this model was prepared for inference by make_generation_fast_ and cannot be trained")
        return super().train(mode)


class FairseqLanguageModel(BaseFairseqModel):
    """A model that is a decoder alone."""

    decoder: Any

    def __init__(self, decoder: FairseqDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, src_tokens: Tensor, src_lengths: Any = None, **kwargs: Any) -> NetOutput:
        """src_tokens (B, T) -> (logits (B, T, V), or features where an adaptive softmax follows; extra dict)."""
        return self.decoder(src_tokens, **kwargs)

    def extract_features(self, src_tokens: Tensor, **kwargs: Any) -> NetOutput:
        """Features (B, T, D) before the output layer, and the extra dict."""
        return self.decoder.extract_features(src_tokens, **kwargs)

    def output_layer(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Features -> logits; features unchanged where an adaptive softmax follows."""
        return self.decoder.output_layer(features, **kwargs)

    @property
    def adaptive_softmax(self) -> Any:
        """The decoder's adaptive softmax, or None."""
        return self.decoder.adaptive_softmax

    def max_positions(self) -> Any:
        """The longest input in tokens."""
        return self.decoder.max_positions()

    def get_target_log_probs(self, net_output: NetOutput, target: Tensor, pad: int) -> Tensor:
        """log p of each target, (B, T) float32 in nats, for target (B, T); zero where the target is `pad`.

        The numbers are those of `get_normalized_probs` gathered at the targets, but no tensor of B x T x V is made: an
        adaptive softmax evaluates only the tails that the targets need, a plain one works in chunks of rows, from the
        logits or, for outputs of `features_only`, from the features. Sums are float32 even for a half-precision
        model."""
        features, extra = net_output
        features = features.reshape(-1, features.size(-1))
        result = features.new_zeros(features.size(0), dtype=torch.float32)
        rows = target.reshape(-1).ne(pad).nonzero().squeeze(1)
        wanted = target.reshape(-1).index_select(0, rows)
        if self.adaptive_softmax is not None:
            scores = self.adaptive_softmax.get_target_log_prob(features.index_select(0, rows), wanted)
            return result.index_copy_(0, rows, scores).view_as(target)
        from_features = extra.get("features_only", False)
        for chunk in row_chunks(len(rows), len(self.decoder.dictionary) if from_features else features.size(1)):
            logits = features.index_select(0, rows[chunk])
            if from_features:
                logits = self.decoder.output_layer(logits)
            result.index_copy_(0, rows[chunk], target_log_softmax(logits, wanted[chunk]))
        return result.view_as(target)

    def max_decoder_positions(self) -> Any:
        """The longest input in tokens."""
        return self.decoder.max_positions()

    @property
    def supported_targets(self) -> set[str]:
        """Kinds of targets that the model can predict."""
        return {"future"}


def check_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises ArchitectureMismatch unless keys and shapes of `state` are exactly the model's."""
    own = model.state_dict()
    problems = [
        _listing(label, sorted(keys))
        for label, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys()))
        if keys
    ]
    shapes = [
        f"{key} {list(state[key].shape)} where the model has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if shapes:
        problems.append(_listing("different shapes", shapes))
    if problems:
        hint = "use the options and the dictionary (dict.txt) that the checkpoint was trained with"
        raise ArchitectureMismatch(f"architectures do not match: {'; '.join(problems)}; {hint}")


def _listing(label: str, items: list[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{label}: {', '.join(items[:limit])}{more}"


def _materialise(model: nn.Module, state: dict[str, Any]) -> None:
    """Gives a meta-device model the tensors of `state`, in the model's types; what was tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in state:
            if id(parameter) not in made:
                value = state[name].detach().to(parameter.dtype)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            _set(model, name, made[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        if name in state:
            _set(model, name, state[name].detach().to(buffer.dtype))


def _set(model: nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[leaf] = value
