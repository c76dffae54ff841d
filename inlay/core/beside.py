"""What trains beside a method's adapters: biases in full, and copies of whole modules."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.adapter import Adapter, Reweight
from inlay.core.base import Base, Kind, Layer, bare_copy


class Bias(Reweight):
    """b -> b': the bias of a layer without another adapter, trained in full (`bias="all"`)."""

    def make(self, base: Base) -> None:
        """Make room for the bias [O]."""
        self.bias = self.parameter(base.shape[0])

    def reset(self, base: Base) -> None:
        """Start from the base's bias."""
        below = base.bias()
        assert below is not None
        with torch.no_grad():
            self.bias.copy_(below)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is, and the trained bias."""
        del bias
        return weight, self.bias.to(weight.dtype)

    def rebias(self, base: Base) -> Tensor | None:
        """Return the trained bias."""
        del base
        return self.bias

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) with the bias exchanged."""
        if base.kind == "norm":  # which axis of its output the bias runs along, only the norm knows
            return super().forward(base, x, *args, **kwargs)
        out = base(x, *args, **kwargs)
        return (out + base.spread(self.bias - base.bias())).to(out.dtype)  # type: ignore[operator]


class Copy(Reweight):
    """W, b -> the copy's own: a trained copy of the whole module in its place (`modules_to_save`).

    Where the module is no layer with a weight, the copy still computes; merging then puts it there
    for good.
    """

    on: ClassVar[frozenset[Kind]] = Adapter.on

    def make(self, base: Base) -> None:
        """Copy the module as it is now, without adapters; it never shares memory with the base."""
        assert isinstance(base, Layer)
        self.module = bare_copy(base.module)
        self._view = base.unpacked
        for parameter in self.module.parameters():
            # a copy of a half-precision head is trained, so it gets the adapters' precision
            if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the copy's weight and bias; TypeError where the module has no single weight."""
        del bias
        own = self._view(self.module)
        below = own.bias()
        return own.weight().to(weight.dtype), None if below is None else below.to(weight.dtype)

    def rebias(self, base: Base) -> Tensor | None:
        """Return the copy's bias."""
        del base
        return self._view(self.module).bias()

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the copy computes, in the dtype that the base would return."""
        own = next((p.dtype for p in self.module.parameters()), base.dtype)
        if own == base.dtype:
            return self.module(x, *args, **kwargs)
        out = self.module(*_floats((x, *args), own), **_floats(kwargs, own))
        return _floats(out, x.dtype if _is_float(x) else base.dtype)

    def lent(self) -> dict[str, Tensor]:
        """Return the copy's weight."""
        return {"weight": self._view(self.module).weight().T}

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the module's own parameter names, as PEFT writes them; buffers stay out."""
        del base
        return {n: (f"module.{n}", tuple(p.shape)) for n, p in self.module.named_parameters()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with its floating tensors in `dtype`; looks into tuples, lists and dicts."""
    if _is_float(value):
        return value.to(dtype)
    if type(value) in (tuple, list):
        return type(value)(_floats(v, dtype) for v in value)
    if isinstance(value, dict):
        value = copy.copy(
            value
        )  # of its own class: what a model returns is often a dict with attributes
        for key in value:
            value[key] = _floats(value[key], dtype)
    return value
