"""Layers whose weight is a model's input embedding: LoRA's `ensure_weight_tying`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from inlay.core.beside import Copy
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.targeted import Extra
from inlay.core.tied import Tied


def paths(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by path as they were before any adapter; each once."""
    return {
        path.replace(".base_layer", ""): module.base_layer if isinstance(module, Inlaid) else module
        for path, module in model.named_modules()
        if not path.endswith(".base_layer") and ".adapters." not in path
    }


def embedding(model: Any) -> str:
    """Return the path of the model's input embedding; UserError where it has none."""
    try:
        layer = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        layer = None
    layer = layer.base_layer if isinstance(layer, Inlaid) else layer
    for path, module in paths(model).items():
        if module is layer:
            return path
    raise UserError(
        f"{type(model).__name__} has no one input embedding: name the layers, {{name: ids}}"
    )


def tied_to(model: nn.Module) -> list[str]:
    """Return the paths of the other layers that have the input embedding's weight."""
    found, first = paths(model), embedding(model)
    weight = getattr(found[first], "weight", None)
    return [p for p, m in found.items() if p != first and getattr(m, "weight", None) is weight]


def ties(
    config: Any, model: nn.Module, adapted: Collection[str], saved: Collection[str]
) -> dict[str, Extra]:
    """Return the embedding's adapter, or copy, and the layers that follow it."""
    first, others = embedding(model), tied_to(model)
    if not others:
        raise UserError(f"ensure_weight_tying, but no layer has the weight of {first!r}: leave it")
    for sites, kind in ((saved, Copy), (adapted, None)):
        if {first, *others}.intersection(sites):
            following = dict.fromkeys(others, Extra(Tied, config, follows=first))
            return {first: Extra(kind, config.at(first)), **following}
    if config.trainable_token_indices is None:
        raise UserError(
            f"ensure_weight_tying, but none of {', '.join([first, *others])} is adapted: name one "
            "in target_modules or modules_to_save, or leave it"
        )
    return {}
