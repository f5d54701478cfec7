"""The activations of a network that key types are made of, collected by hooks while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fairseq.errors import BadFlag
from fairseq.key_types import FFN_INPUT, FINAL_HIDDEN, FLAG, KEY_TYPES, key_type_named
from fairseq.models.huggingface.structure import (
    MODULE_FLAG,
    decoder_layers,
    feed_forward,
    first_called_module,
    first_tensor,
    named_module,
)


class Collector:
    """What a key type needs of a causal language model of transformers. key_type: its name, or None for none; module:
    name of the module whose input is taken for that of the last feed-forward block (found by itself otherwise).

    Attributes: below, the module below the head; layers, the decoder layers; module, the name of the module whose input
    keys are made of (None where they are made of no module's). BadFlag for a model that has no such activations."""

    def __init__(self, network: Any, key_type: str | None, module: str | None = None) -> None:
        self.needs = () if key_type is None else key_type_named(key_type).needs
        self.layers = decoder_layers(network)
        self._ffn: nn.Module | None = None
        if FFN_INPUT in self.needs or module is not None:
            self._ffn = feed_forward(network) if module is None else named_module(network, module)
        self._check_needs(network, key_type)
        made_of = self._ffn if FFN_INPUT in self.needs else None
        self.module = next((name for name, part in network.named_modules() if part is made_of), None)
        self.below = first_called_module(network)

    def _check_needs(self, network: Any, key_type: str | None) -> None:
        has = self._available()
        if any(not has(need) for need in self.needs):
            names = [name for name, cls in sorted(KEY_TYPES.items()) if all(map(has, cls.needs))]
            kind = type(network).__name__
            found = f"{key_type} for {kind}, whose last layer has no feed-forward block or which has fewer layers"
            raise BadFlag(FLAG, found, "one of " + ", ".join(names), f"or name a module with {MODULE_FLAG}")

    def _available(self) -> Any:
        layers = 0 if self.layers is None else len(self.layers)
        given = {FINAL_HIDDEN, *([FFN_INPUT] if self._ffn is not None else [])}
        return lambda need: need in given if isinstance(need, str) else -layers - 1 <= need <= layers

    @contextlib.contextmanager
    def collecting(self) -> Iterator[dict[str | int, Tensor]]:
        """While it lasts, each pass of the network puts what the key type needs into the dict that it gives."""
        collected: dict[str | int, Tensor] = {}
        handles: list[Any] = []

        def inputs_to(name: str | int) -> Any:
            def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = first_tensor(args) if args else None
                values = (v for v in kwargs.values() if isinstance(v, Tensor))
                collected[name] = next(values) if value is None else value

            return note

        def outputs_as(name: str | int) -> Any:
            def note(module: Any, args: Any, output: Any) -> None:
                collected[name] = hidden_states(output)

            return note

        try:
            if FFN_INPUT in self.needs and self._ffn is not None:
                handles.append(self._ffn.register_forward_pre_hook(inputs_to(FFN_INPUT), with_kwargs=True))
            if FINAL_HIDDEN in self.needs:
                handles.append(self.below.register_forward_hook(outputs_as(FINAL_HIDDEN)))
            for number in self.needs:
                if not isinstance(number, int) or self.layers is None:
                    continue
                place = number if number >= 0 else len(self.layers) + 1 + number
                if place == 0:
                    handles.append(self.layers[0].register_forward_pre_hook(inputs_to(0), with_kwargs=True))
                else:
                    handles.append(self.layers[place - 1].register_forward_hook(outputs_as(place)))
            yield collected
        finally:
            for handle in handles:
                handle.remove()

    def extra(self, collected: Mapping[str | int, Tensor], rows: int, length: int, first: int = 0) -> dict[str, Any]:
        """The dict that `key_types.keys_of` reads, with activations (length - first, rows, D), of one pass over `rows`
        rows of `length` tokens; the first `first` positions are left out. Empty without a key type."""
        if not self.needs:
            return {}

        def time_first(value: Tensor) -> Tensor:
            return value.reshape(rows, length, -1).transpose(0, 1)[first:]

        count = 0 if self.layers is None else len(self.layers) + 1
        states: list[Tensor | None] = [None] * count
        extra: dict[str, Any] = {"inner_states": states}
        for name, value in collected.items():
            if isinstance(name, int):
                states[name] = time_first(value)
            else:
                extra[name] = time_first(value)
        return extra


def hidden_states(output: Any) -> Tensor:
    """The hidden states (B, T, D) in what a layer, or the module below the head, returned."""
    value = first_tensor(output.last_hidden_state if hasattr(output, "last_hidden_state") else output)
    if value is None:
        value = first_tensor(output[0])
    assert value is not None
    return value
