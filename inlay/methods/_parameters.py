"""LoRA on raw parameters: P_e + s B_e A_e for each expert e; LoRA's `target_parameters`.

P [E, O, I], or [E, I, O] where the module says it `is_transposed`, or a matrix [O, I] (E = 1).
A [E R, I] holds the experts' one after the other, B [O, R E] expert by expert within a rank, as do
PEFT's files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.adapter import Reweight
from inlay.core.base import Base, Kind, Layer
from inlay.core.errors import UserError
from inlay.core.raw import called, is_named, joined, raw, shapes, split
from inlay.core.targeted import Extra
from inlay.methods.lora import Lora, LoraConfig, draw


class ParameterLora(Reweight):
    """The updates of the named parameters of one module."""

    on: ClassVar[frozenset[Kind]] = frozenset({"module"})
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make A [E R, I] and B [O, R E] of each parameter."""
        self._ranks: dict[str, tuple[int, float]] = {}
        self._shapes = shapes(base.module)
        self._flipped = bool(getattr(base.module, "is_transposed", False))
        for name, shape in self._shapes.items():
            path = f"{base.path}.{name}" if base.path else name
            if not is_named(path, self.config.target_parameters or ()):
                continue
            here = self.config.at(path)
            self._ranks[name] = here.r, here.scaling
            experts, outputs, inputs = self._sizes(shape)
            self.register_parameter(f"{name}_lora_A", self.parameter(experts * here.r, inputs))
            self.register_parameter(f"{name}_lora_B", self.parameter(outputs, here.r * experts))

    def _sizes(self, shape: torch.Size) -> tuple[int, int, int]:
        experts, outputs, inputs = shape if len(shape) == 3 else (1, *shape)
        if self._flipped and len(shape) == 3:
            outputs, inputs = inputs, outputs
        return experts, outputs, inputs

    def reset(self, base: Base) -> None:
        """Make each A random and each B zero."""
        del base
        for name in self._ranks:
            a, b = (self.get_parameter(f"{name}_lora_{part}") for part in "AB")
            draw(self.config, a, b)

    def _updated(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters `own` with their updates."""
        found = dict(own)
        for name, (r, scaling) in self._ranks.items():
            p = own[name]
            experts, outputs, inputs = self._sizes(p.shape)
            a = self.get_parameter(f"{name}_lora_A").to(p.dtype).view(experts, r, inputs)
            b = self.get_parameter(f"{name}_lora_B").to(p.dtype).view(outputs, r, experts)
            left, right = b.permute(2, 0, 1), a
            if self._flipped and p.ndim == 3:
                left, right = right.mT, left.mT
            with torch.autocast(p.device.type, enabled=False):  # the parameter keeps its dtype
                # one tensor of the stack's size, and none for the update
                stack = p.view(experts, left.shape[1], right.shape[2])
                found[name] = torch.baddbmm(stack, left, right, alpha=scaling).view(p.shape)
        return found

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return all the module's values [N], those of the named parameters updated."""
        return joined(self._updated(split(weight, self._shapes))), bias

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes with the updated parameters in their places."""

        def updated() -> dict[str, Tensor]:
            plain = isinstance(base, Layer)
            return self._updated(raw(base.module) if plain else split(base.weight(), self._shapes))

        return called(base.module, updated, (x, *args), kwargs)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: each further parameter of a module stands around those before it."""
        del base
        found, last = {}, len(self._ranks) - 1
        for i, name in enumerate(self._ranks):
            for part in ("lora_A", "lora_B"):
                inner = f"{name}_{part}"
                shape = tuple(self.get_parameter(inner).shape)
                found[f"{'base_layer.' * (last - i)}{part}.weight"] = inner, shape
        return found


def parameter_sites(
    config: LoraConfig, found: Mapping[str, nn.Module], taken: Collection[str]
) -> dict[str, Extra]:
    """Return by module path the adapters of raw parameters; UserError where there can be none."""
    sites: dict[str, Extra] = {}
    for full in config.parameters(found):
        path, _, name = full.rpartition(".")
        module = found[path]
        shape = shapes(module).get(name)
        linear = isinstance(module, nn.Linear) and name == "weight"
        if path in taken:
            raise UserError(f"{path!r} is in target_modules and {full!r} in target_parameters too")
        stack = shape is not None and len(shape) in (2, 3)
        if not linear and (not stack or isinstance(module, nn.Linear | nn.Embedding)):
            raise UserError(
                f"{full!r} is a {list(getattr(module, name).shape)} of a {type(module).__name__}: "
                "target_parameters takes matrices, and stacks of them, that are no layer's; name "
                "the layer in target_modules"
            )
        sites[path] = Extra(Lora, config.at(full)) if linear else Extra(ParameterLora, config)
    return sites
