"""Layers of a model that come more than once, over the same weights: LoRA's `layer_replication`.

The ranges [0, 4) and [2, 5) make 0 1 2 3 2 3 4 of a model's layers: it gets deeper, and larger by
the adapters of the layers that it has twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from inlay.core.errors import UserError

MOST_LAYERS = 4096
"""More layers than any model has."""


class Repeated:
    """The layers of `model`, repeated until `undo`."""

    def __init__(self, model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
        """Repeat them; UserError where the model's layers cannot be told, or are fewer."""
        self._model, self._config = model, _settings(model)
        self._path, self._layers = _layers(model, self._config.num_hidden_layers)
        order = _order(ranges, len(self._layers))
        self._were = {
            name: getattr(self._config, name)
            for name in ("num_hidden_layers", "layer_types")
            if getattr(self._config, name, None) is not None
        }
        self._put(nn.ModuleList([_sharing(self._layers[i], at) for at, i in enumerate(order)]))
        self._config.num_hidden_layers = len(order)
        if "layer_types" in self._were:  # each layer's kind of attention
            self._config.layer_types = [self._were["layer_types"][i] for i in order]

    def undo(self) -> None:
        """Give the model its layers back."""
        self._put(self._layers)
        # the number last is what transformers checks the list of kinds against
        for name, value in reversed(self._were.items()):
            object.__setattr__(self._config, name, value)

    def part(self) -> None:
        """Give each layer weights of its own, where adapters were merged into some of its own."""
        seen: set[int] = set()
        for layer in self._model.get_submodule(self._path).children():
            own: dict[int, Any] = {}
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in seen:
                        module._parameters[name] = copy.deepcopy(parameter)
                    elif parameter is not None:
                        own[id(parameter)] = parameter
            seen.update(own)

    def _put(self, layers: nn.ModuleList) -> None:
        above, _, name = self._path.rpartition(".")
        self._model.get_submodule(above)._modules[name] = layers


def _settings(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    told = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(told, "num_hidden_layers") or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} does not say how many layers it has in one stack, so "
            "layer_replication cannot tell which to repeat: leave it out"
        )
    return told


def _layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of its {count} layers, which layer_replication "
            "repeats: leave it out"
        )
    return found[0]


def _order(ranges: Sequence[Sequence[int]], count: int) -> list[int]:
    order: list[int] = []
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise UserError(
                f"layer_replication has [{start}, {end}], and the model has layers 0 to "
                f"{count - 1}: a range goes from its first layer to before another"
            )
        order += range(start, end)
        if len(order) > MOST_LAYERS:
            raise UserError(f"layer_replication makes more than {MOST_LAYERS} layers")
    return order


def _sharing(layer: nn.Module, place: int) -> nn.Module:
    """Return a copy of `layer` with the same parameters and buffers, for another place."""
    known: dict[int, Any] = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    copied = copy.deepcopy(layer, known)
    module: Any
    for module in copied.modules():
        if hasattr(module, "layer_idx"):  # by which a cache tells the layers apart
            module.layer_idx = place
    return copied
