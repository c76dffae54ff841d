"""Our parameters <-> the keys of PEFT's files: `base_model.model.<path>.<the method's key>`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.roster import Roster
from inlay.model.targets import plain

PREFIX = "base_model.model."
CARRIED = ("embed_tokens", "lm_head")
"""Layers whose base weight PEFT's files carry along where an adapter sits on them."""
LISTED = 20
"""Names an error lists before it only counts."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a file lives: a parameter of an adapter, and its shape in the file."""

    adapter: Adapter
    parameter: str
    shape: tuple[int, ...]
    device: torch.device

    def get(self) -> Tensor:
        """Return the parameter in the shape of the file, detached, sharing memory where it can."""
        return self.adapter.get_parameter(self.parameter).detach().reshape(self.shape)

    def put(self, tensor: Tensor) -> None:
        """Copy `tensor` into the parameter, giving it memory where it has none yet."""
        old = self.adapter.get_parameter(self.parameter)
        value = tensor.to(old.dtype).reshape(old.shape)
        if not old.is_meta:
            old.data.copy_(value)
            return
        *path, name = self.parameter.split(".")
        owner = self.adapter.get_submodule(".".join(path))
        # cloned: a tensor that views the mapped file changes with it
        new = nn.Parameter(value.to(self.device, copy=True), old.requires_grad)
        owner.register_parameter(name, new)


def slots(roster: Roster, name: str) -> dict[str, Slot]:
    """Return what the file of adapter `name` holds: key -> slot."""
    return {
        f"{PREFIX}{path}.{key}": Slot(adapter, parameter, tuple(shape), host.base.device)
        for path, host, adapter in roster.adapters(name)
        for key, (parameter, shape) in adapter.keys(host.base).items()
    }


def carried(roster: Roster, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (key of its weight, layer) of the embeddings whose base weight goes into the file too.

    As PEFT does: where the adapter sits on them, and where the vocabulary was resized.
    """
    for path, host, _ in roster.adapters(name):
        if path.rpartition(".")[2] in CARRIED and "base_layer.weight" not in _keys(host, name):
            yield f"{PREFIX}{path}.base_layer.weight", host.base_layer
    if is_resized(roster.model):
        layers = {id(plain(m)) for m in embeddings(roster.model)}
        held = {path for path, _, _ in roster.adapters(name)}
        for path, module in roster.model.named_modules():
            if id(module) in layers and path.removesuffix(".base_layer") not in held:
                yield f"{PREFIX}{path.removesuffix('.base_layer')}.weight", module


def embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input and output embeddings of a transformers model, those there are."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, getter)() for getter in getters if hasattr(model, getter)]
    return [module for module in found if module is not None]


def is_resized(model: nn.Module) -> bool:
    """Return whether the model's vocabulary is no longer that of the checkpoint it was loaded from.

    Only what lies on this machine is asked; saving an adapter reaches for no network.
    """
    config = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    size = getattr(config, "vocab_size", None)
    if not origin or size is None or not os.path.isdir(origin):
        return False
    try:
        return bool(type(config).from_pretrained(origin).vocab_size != size)  # type: ignore[union-attr]
    except (OSError, ValueError):
        return False


def compare(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Slot], where: Any) -> None:
    """Raise one UserError that lists every missing, unexpected and misshaped tensor of a file."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    misshaped = [
        f"{key} is {list(found[key])}, not {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & found.keys())
        if tuple(found[key]) != wanted[key].shape
    ]
    parts = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"the tensors of {where} do not fit this model and its adapter_config.json; nothing "
            "was "
            f"loaded. {'; '.join(parts)}. Load it on the base it was trained on"
        )


def listed(names: list[str]) -> str:
    """Return the names, the first LISTED of them where there are more."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _keys(host: Inlaid, name: str) -> set[str]:
    return set(host.adapters[name].keys(host.base))  # type: ignore[arg-type, operator]
