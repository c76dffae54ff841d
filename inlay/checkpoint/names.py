"""Our parameters <-> the keys of PEFT's files: `base_model.model.<path>.<the method's key>`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.fingerprint import own_parameters
from inlay.core.adapter import Adapter, Shared
from inlay.core.errors import UserError
from inlay.model.roster import Roster
from inlay.model.targets import modules, plain

ROOT = "base_model."
"""What every key begins with; what all sites share stands right below it."""
PREFIX = f"{ROOT}model."
CARRIED = ("embed_tokens", "lm_head")
"""Layers whose base weight PEFT's files carry along where an adapter sits on them."""
LISTED = 20
"""Names an error lists before it only counts."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a file lives: a parameter or buffer of an adapter; its shape there."""

    adapter: Adapter
    parameter: str
    shape: tuple[int, ...]
    device: torch.device

    def get(self) -> Tensor:
        """Return the tensor in the shape of the file, detached, sharing memory where it can."""
        owner, name = self._place()
        held: Tensor = getattr(owner, name)
        return held.detach().reshape(self.shape)

    def put(self, tensor: Tensor) -> None:
        """Copy `tensor` into the parameter or buffer, giving it memory where it has none yet."""
        if self.parameter in self.adapter.computed:
            self.adapter.fill(self.parameter, tensor.to(self.device, copy=True))
            return
        owner, name = self._place()
        old: Tensor = getattr(owner, name)
        value = tensor.to(old.dtype).reshape(old.shape)
        if not old.is_meta:
            old.data.copy_(value)
            return
        # cloned: a tensor that views the mapped file changes with it
        own = value.to(self.device, copy=True)
        if isinstance(old, nn.Parameter):
            owner.register_parameter(name, nn.Parameter(own, old.requires_grad))
        else:
            owner.register_buffer(name, own)

    def _place(self) -> tuple[nn.Module, str]:
        path, _, name = self.parameter.rpartition(".")
        if path == Shared.lent_as:
            return self.adapter._held[0], name
        return self.adapter.get_submodule(path), name


def slots(roster: Roster, name: str) -> dict[str, Slot]:
    """Return what the file of adapter `name` holds: key -> slot."""
    # PEFT sets virtual tokens around the model and not into it: its paths are a level shorter
    prefix = ROOT if roster.configs[name].rooted else PREFIX
    found = {}
    for path, host, adapter in roster.adapters(name):
        for key, (parameter, shape) in adapter.keys(host.base).items():
            found[f"{prefix}{path}.{key}" if path else key] = Slot(
                adapter, parameter, tuple(shape), host.base.device
            )
        shared = adapter._modules.get(Shared.lent_as)
        if isinstance(shared, Shared):
            for key, (parameter, shape) in shared.keys().items():
                where = f"{Shared.lent_as}.{parameter}"
                found[ROOT + key] = Slot(adapter, where, tuple(shape), host.base.device)
    return found


def complete(roster: Roster, name: str) -> None:
    """Make what the file of adapter `name` does not hold, now that its tensors are in place."""
    for _, host, adapter in roster.adapters(name):
        shared = adapter._modules.get(Shared.lent_as)
        if isinstance(shared, Shared):
            shared.complete()
        adapter.complete(host.base)


def carried(roster: Roster, name: str) -> dict[str, nn.Parameter]:
    """Return by key the embeddings' own weights that go into the file of adapter `name` too.

    As PEFT does: where the adapter sits on them, and where the vocabulary was resized.
    """
    if roster.configs[name].rooted:
        return {}
    resized = is_resized(roster.model)
    held = {path: adapter for path, _, adapter in roster.adapters(name)}
    found = {}
    for path, weight in embeddings(roster.model).items():
        if path in held and path.rpartition(".")[2] in CARRIED:
            if not held[path].carries and not resized:
                continue
            found[f"{PREFIX}{path}.base_layer.weight"] = weight
        elif path not in held and resized:
            found[f"{PREFIX}{path}.weight"] = weight
    # a copy in the embedding's place has the name already, and stands for it
    return {
        k: w for k, w in found.items() if k.replace(".base_layer", "") not in slots(roster, name)
    }


def embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by module path the weights of a transformers model's input and output embeddings.

    They are the base's own, also where adapters are merged into them.
    """
    layers = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # CLIP has two towers, and no such
            layers.add(id(plain(getattr(model, getter)())))
    found: dict[str, nn.Parameter] = {}
    for path, module in modules(model):
        if id(plain(module)) in layers:
            weight = own_parameters(module).get("weight")
            if weight is not None:
                found[path] = weight
    return found


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
