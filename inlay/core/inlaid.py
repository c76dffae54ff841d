"""The one host of every method, base and adapter name: a frozen layer with adapters set into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter, Delta, Reweight
from inlay.core.base import Base, Host, Layer
from inlay.core.beside import Copy
from inlay.core.errors import UserError
from inlay.core.selection import Selection


class Adapted(Base):
    """A base with one adapter over it, itself a base: a stack of adapters is a fold of this."""

    def __init__(self, adapter: Adapter, below: Base) -> None:
        """Set `adapter` over `below`."""
        self.adapter, self.below = adapter, below
        self.module, self.kind = below.module, below.kind

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The shape of the layer at the bottom."""
        return self.below.shape

    @property
    def features(self) -> tuple[int, int]:
        """The widths of the layer at the bottom."""
        return self.below.features

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the adapter computes over what lies below."""
        return self.adapter(self.below, x, *args, **kwargs)

    def _reweight(self) -> Reweight:
        if not isinstance(self.adapter, Reweight):
            raise TypeError(f"{type(self.adapter).__name__} cannot be said as a weight")
        return self.adapter

    def weight(self) -> Tensor:
        """Return the adapted weight [O, I]; TypeError where no weight can say it."""
        return self._reweight().reweight(self.below.weight(), self.below.bias())[0]

    def bias(self) -> Tensor | None:
        """Return the adapted bias [O], or None; TypeError where no weight can say the adapter."""
        return self._reweight().rebias(self.below)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the operator of the layer at the bottom."""
        return self.below.apply(x, weight, bias)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return A applied by the layer at the bottom."""
        return self.below.down(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return B applied by the layer at the bottom."""
        return self.below.up(h, b)

    def spread(self, vector: Tensor) -> Tensor:
        """Return `vector`, shaped by the layer at the bottom."""
        return self.below.spread(vector)

    def file_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the file shapes of the layer at the bottom."""
        return self.below.file_shapes(r)


class Inlaid(Host):
    """A frozen layer and its adapters by name; `selection` says which of them compute."""

    def __init__(self, base: Layer, selection: Selection) -> None:
        """Host `base`, with no adapter yet."""
        super().__init__()
        self.base_layer = base.module
        self.adapters = nn.ModuleDict()
        self.base = base
        self.selection = selection
        self.fast: Callable[..., Any] | None = None
        self._kept: dict[str, nn.Parameter | None] | None = None
        self.training = base.module.training

    def stack(self, names: tuple[str, ...]) -> Base:
        """Return the base with those of the named adapters that sit here, the first one lowest."""
        layer: Base = self.base
        for name in names:
            if name in self.adapters:
                layer = Adapted(self.adapters[name], layer)  # type: ignore[arg-type]
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the selected adapters compute over the base."""
        if not args:
            args, kwargs = self._positional(kwargs)
        chosen = self.selection
        if chosen.merged:
            return self._merged(*args, **kwargs)
        if chosen.rows is not None:
            return self._rowwise(*args, **kwargs)
        if self.fast is not None:  # which may well give the stack's result itself
            return self.fast(*args, **kwargs)
        return self.stack(chosen.active)(*args, **kwargs)

    def _positional(self, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the layer's first argument out of the keywords; its name is the model's choice."""
        first = next(iter(inspect.signature(self.base_layer.forward).parameters), "")
        if first not in kwargs:
            raise TypeError(
                f"{type(self.base_layer).__name__} was called without its input {first!r}"
            )
        return (kwargs[first],), {k: v for k, v in kwargs.items() if k != first}

    def _merged(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        last = self._last(self.selection.merged)
        if isinstance(last, Copy):
            return last(self.base, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _last(self, names: tuple[str, ...]) -> Adapter | None:
        found = [self.adapters[n] for n in names if n in self.adapters]
        return found[-1] if found else None  # type: ignore[return-value]

    def _rowwise(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        names = set(self.selection.rows or ())
        if names.isdisjoint(self.adapters):
            return self.base_layer(x, *args, **kwargs)
        if len(names) == 1:
            return self.stack(tuple(names))(x, *args, **kwargs)
        if not isinstance(x, Tensor) or args or kwargs:
            raise UserError(
                f"{type(self.base_layer).__name__} takes more than one tensor: only a layer of one "
                "input can serve several adapters in a batch"
            )
        groups = self.selection.groups(len(x), x.device)
        deltas = {n: a for n, a in self.adapters.items() if n in names and isinstance(a, Delta)}
        if len(deltas) == len(names.intersection(self.adapters)):
            return self._added(x, {n: (groups[n], delta) for n, delta in deltas.items()})
        out: Tensor | None = None
        for name, index in groups.items():
            with self.selection.alone(name, x, index):  # a block may hold hosts of its own
                part = self.stack((name,))(x.index_select(0, index))
            if not isinstance(part, Tensor):
                raise UserError(
                    f"{type(self.base_layer).__name__} returns {type(part).__name__}: only a layer "
                    "that returns one tensor can serve several adapters in a batch"
                )
            if out is None:
                out = part.new_empty(len(x), *part.shape[1:])
            out = out.index_copy(0, index, part)
        return out

    def _added(self, x: Tensor, deltas: dict[str, tuple[Tensor, Delta]]) -> Tensor:
        """Run the base once for all rows, and each additive adapter on its own rows."""
        out: Tensor = self.base(x)
        for index, delta in deltas.values():
            rows = out.index_select(0, index) + delta.change(self.base, x.index_select(0, index))
            out = out.index_copy(0, index, rows.to(out.dtype))
        return out

    @torch.no_grad()
    def merge(self, names: tuple[str, ...], *, check: bool = False) -> None:
        """Store the weight the named adapters mean into the base layer, and keep the original.

        Computed in float32 from the original weight and rounded once. With `check`, raises
        UserError where a rounded value is not finite, before anything is stored. Raises TypeError
        for an adapter no weight can say.
        """
        assert self._kept is None, "merged twice"
        adapters = [self.adapters[n] for n in names if n in self.adapters]
        top = self._last(names)
        if top is None or isinstance(top, Copy):
            # a copy stands in the layer's place and hides what lies below: nothing to store
            if check and top is not None:
                self._finite(names, *top.parameters())
            return
        for name in names:
            if name in self.adapters and not isinstance(self.adapters[name], Reweight):
                raise TypeError(
                    f"{name!r} is a {type(self.adapters[name]).__name__}, which no weight can say, "
                    "so it cannot be merged: save and load it beside its base"
                )
        weight, bias = self.base.weight(), self.base.bias()
        narrow, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        for adapter in adapters:
            assert isinstance(adapter, Reweight)
            weight, bias = adapter.reweight(weight, bias)
        if check:
            self._finite(names, weight.to(narrow), bias if bias is None else bias.to(narrow))
        self._kept = dict(self.base_layer._parameters)
        self.base.store(weight, bias)

    def _finite(self, names: tuple[str, ...], *values: Tensor | None) -> None:
        if not all(value.isfinite().all() for value in values if value is not None):
            raise UserError(f"merging {list(names)} gives values that are not finite")

    def unmerge(self) -> None:
        """Put the kept original back: the same parameter objects, bit for bit, ties included."""
        if self._kept is None:
            return
        for name, parameter in self._kept.items():
            merged = self.base_layer._parameters[name]
            if parameter is not None and merged is not None:
                # the model may have been moved or converted while it was merged
                parameter.data = parameter.data.to(merged.device, merged.dtype)
        self.base_layer._parameters.clear()
        self.base_layer._parameters.update(self._kept)
        self._kept = None

    def originals(self) -> dict[str, nn.Parameter | None]:
        """Return the layer's own parameters by name, also while merged ones are in their place."""
        return dict(self.base_layer._parameters if self._kept is None else self._kept)

    def result(self, names: tuple[str, ...]) -> nn.Module:
        """Return the plain module that stands here once the named adapters are merged for good."""
        top = self._last(names)
        if not isinstance(top, Copy):
            return self.base.settled()
        return top.module.to(self.base.dtype)

    def __getattr__(self, name: str) -> Any:
        """Return the base layer's attribute: model code asks its layers for `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # a special method of the layer (__deepcopy__) would act on the layer and lose the host
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the base layer what is the base layer's: tying weights assigns `layer.weight`."""
        if name in ("weight", "bias") and "base_layer" in self.__dict__.get("_modules", {}):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)
