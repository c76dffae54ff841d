"""Modules that are no layer but hold matrices themselves: a mixture's experts, a router.

Their weight is one vector [N] of all their parameters (`core.raw`); they compute with another while
it stands in their place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inlay.bases._experts import PackedExperts
from inlay.bases.plain import LAYERS as PLAIN_LAYERS
from inlay.bases.plain import Opaque
from inlay.core.base import store
from inlay.core.raw import joined, raw, shapes, split


class Parameters(Opaque):
    """A module of parameters of its own, and no others, a matrix or a stack of them among these."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is such a one, and neither torch's nor one with its own view."""
        own, all_of_it = shapes(module), list(module.parameters())
        if len(own) < len(all_of_it) or not any(len(shape) in (2, 3) for shape in own.values()):
            return False
        if type(module).__module__.startswith("torch.nn."):
            return False  # why none of its own views takes it, it says itself
        return not any(layer.accepts(module) for layer in PLAIN_LAYERS if layer is not Opaque)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The number of values [N], with 1 for inputs that it does not have."""
        return sum(shape.numel() for shape in shapes(self.module).values()), 1

    def weight(self) -> Tensor:
        """Return the parameters as one vector [N]."""
        return joined(raw(self.module))

    def bias(self) -> Tensor | None:
        """Return None: a bias is in the vector."""
        return None

    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the module computes with these values [N]."""
        assert bias is None
        return cast(Tensor, functional_call(self.module, split(weight, shapes(self.module)), (x,)))

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put the values [N] in place."""
        assert bias is None
        store(self.module, **split(weight, shapes(self.module)))

    def settled(self) -> nn.Module:
        """Return the module, without codes where something was stored in their place."""
        module = self.module
        if isinstance(module, PackedExperts) and not module.in_codes:
            return module.unpacked()
        return module

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.module.buffers() if self._codes else self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters: of packed ones, what they are dequantized to."""
        return self._codes.compute_dtype if self._codes else super().dtype

    @property
    def _codes(self) -> PackedExperts | None:
        module = self.module
        return module if isinstance(module, PackedExperts) and module.in_codes else None


LAYERS = (Parameters,)
