"""Key types: the activations of a language model that form a key of the datastore, or a query, named in the same way
for all models.

`@register_key_type("name")` makes a class available as `--knn-keytype name`, also one of `--user-dir`; keys may have
any width. docs/extending.md has a complete example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fairseq.errors import BadFlag, UserError
from fairseq.registry import class_registrar, unknown_name

FLAG = "--knn-keytype"
DEFAULT = "last_ffn_input"
FFN_INPUT, FINAL_HIDDEN = "last_ffn_input", "final_hidden"  # activations that are no layer's output


class MissingActivation(LookupError):
    """A model has no activation of this name."""


class Activations:
    """What a model computed for T positions of B rows; each activation is (T, B, D), D as wide as it is in the model.

    Made from the dict that a decoder returns beside its features, in which fairseq's names are `inner_states` (the
    embeddings and each layer's output) and `last_ffn_input`. MissingActivation for what is not in it."""

    def __init__(self, extra: Mapping[str, Any], positions: int) -> None:
        self._extra, self._positions = extra, positions

    def named(self, name: str) -> Tensor:
        """The activation of this name in the dict."""
        value = self._extra.get(name)
        if value is None:
            raise MissingActivation(name)
        return value[-self._positions :]  # the last layer may skip first positions

    @property
    def last_ffn_input(self) -> Tensor:
        """Input of the last layer's feed-forward block."""
        return self.named(FFN_INPUT)

    @property
    def final_hidden(self) -> Tensor:
        """What the output layer (the LM head) reads."""
        return self.named(FINAL_HIDDEN)

    def layer_output(self, number: int) -> Tensor:
        """Output of a layer, with its residual sums: -1 is the last layer, 0 the embeddings, 1 the first layer."""
        states: Sequence[Tensor | None] = self._extra.get("inner_states") or ()
        if not -len(states) <= number < len(states) or (state := states[number]) is None:
            raise MissingActivation(f"layer {number}")
        return state[-self._positions :]


class KeyType:
    """Turns activations into keys. needs: the activations that it reads, `last_ffn_input`, `final_hidden` or numbers of
    layers (-1 is the last); a model that can return selected activations returns these."""

    needs: ClassVar[tuple[str | int, ...]] = ()

    def keys(self, activations: Activations) -> Tensor:
        """(T, B, K) keys of any width K; K is the same for every batch."""
        raise UserError(f"{type(self).__name__}: found no method keys, expected one in each key type; define it")


KEY_TYPES: dict[str, type[KeyType]] = {}
register_key_type = class_registrar(FLAG, KEY_TYPES, KeyType)


def key_type_named(name: str) -> KeyType:
    """The key type that is registered under `name`; BadFlag when there is none."""
    if name not in KEY_TYPES:
        raise unknown_name(FLAG, name, KEY_TYPES)
    return KEY_TYPES[name]()


def keys_of(name: str, extra: Mapping[str, Any], rows: int, positions: int) -> Tensor:
    """(T, B, K) keys of type `name` for `positions` T of `rows` B from the dict that a decoder returned beside its
    features.

    A model may put keys of a type into the dict itself, under the type's name. BadFlag when it has no such keys, and
    where those that the type or the model gives are no (T, B, K) floating-point numbers."""
    if extra.get(name) is not None:
        keys, source = extra[name], "the model gives"
    else:
        try:
            keys, source = key_type_named(name).keys(Activations(extra, positions)), "its method keys returns"
        except MissingActivation as missing:
            found = f"{name}, for which the model gives no {missing}"
            raise BadFlag(FLAG, found, _available(extra, positions)) from None
    is_tensor = isinstance(keys, Tensor)
    if not is_tensor or keys.shape[:-1] != (positions, rows) or not keys.shape[-1] or not keys.is_floating_point():
        what = f"{keys.dtype} of shape {tuple(keys.shape)}" if is_tensor else type(keys).__name__
        expected = f"floating-point keys of shape (positions, texts, width), here ({positions}, {rows}, width)"
        raise BadFlag(FLAG, f"{name}, for which {source} {what}", expected, "correct the key type's class")
    return keys


def _available(extra: Mapping[str, Any], positions: int) -> str:
    names = []
    for name in sorted(KEY_TYPES):
        try:
            KEY_TYPES[name]().keys(Activations(extra, positions))
        except Exception:  # noqa: BLE001, S112  (a user's type may fail in any way; then it is not one to advise)
            continue
        names.append(name)
    return "one of " + ", ".join(names) if names else "a model that gives its activations"


@register_key_type("last_ffn_input")
class LastFfnInput(KeyType):
    """The papers' key (Khandelwal et al., 2020): the input of the last layer's feed-forward block."""

    needs = (FFN_INPUT,)

    def keys(self, activations: Activations) -> Tensor:
        return activations.last_ffn_input


@register_key_type("last_ffn_output")
class LastFfnOutput(KeyType):
    """The last layer's output, its residual sum included, before the final norm."""

    needs = (-1,)

    def keys(self, activations: Activations) -> Tensor:
        return activations.layer_output(-1)


@register_key_type("final_hidden")
class FinalHidden(KeyType):
    """What the output layer reads: after the final norm, and a projection if there is one."""

    needs = (FINAL_HIDDEN,)

    def keys(self, activations: Activations) -> Tensor:
        return activations.final_hidden
