"""The adapters that a node of `kernels.lora` computes: those whose update is two thin factors.

A site is such an adapter over its linear layer: what it gives the node, and what it makes of the
node's output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from inlay.bases.plain import Linear
from inlay.core.adapter import Delta
from inlay.core.inlaid import Inlaid
from inlay.kernels.columns import times_columns
from inlay.kernels.lora import Member, checkpointing
from inlay.methods._dora import Dora
from inlay.methods.lora import Lora


class Site:
    """An additive adapter: base(x) + B A d(x)."""

    def __init__(self, host: Inlaid, adapter: Delta) -> None:
        """Take the adapter of a host for which `site` found that it can share."""
        self.host, self.adapter = host, adapter
        self.layer = cast(Linear, host.base)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters."""
        return self.adapter.dtype

    @property
    def version(self) -> int:
        """A number that grows when the adapter's parameters are written to."""
        parts = (self.adapter, *self.adapter._held)
        return sum(_version(p) for part in parts for p in part.parameters())

    def member(self, dtype: torch.dtype) -> Member:
        """Return what the node needs, for a product in `dtype`."""
        del dtype
        factors = self.adapter.factors(self.adapter.dtype)
        assert factors is not None
        dropout = _rate(self.adapter) if self.adapter.training else 0.0
        return Member(self.layer, factors[1], factors[0], dropout)

    def finish(self, out: Tensor) -> Tensor:
        """Return what the adapted layer computes, of what the node made."""
        return out


class DoraSite(Site):
    """DoRA: c * (W x + B A x) + b with c = m / |W + B A|, a constant but for m."""

    def __init__(self, host: Inlaid, adapter: Dora) -> None:
        """Take the DoRA of a host for which `site` found that it can share."""
        super().__init__(host, adapter.lora)
        self.dora = adapter
        self._squares: tuple[list[Any], Tensor] | None = None
        self._scale: Tensor | None = None

    @property
    def version(self) -> int:
        """A number that grows when the adapter's parameters are written to."""
        return super().version + _version(self.dora.magnitude)

    @property
    def squares(self) -> Tensor:
        """The squared norms [O] of the frozen weight, taken once for as long as it is the same."""
        module = self.layer.module
        wide = torch.promote_types(self.dora.magnitude.dtype, torch.float32)
        held = [*module._parameters.values(), *module._buffers.values()]
        now = [wide, *((t.data_ptr(), _version(t), t.dtype) for t in held if t is not None)]
        if self._squares is None or self._squares[0] != now:
            norms = torch.linalg.vector_norm(self.layer.weight(), dim=1, dtype=wide)
            self._squares = now, norms**2
        return self._squares[1]

    def member(self, dtype: torch.dtype) -> Member:
        """Return what the node needs, having found c with the factors as they are."""
        member = super().member(dtype)
        with torch.no_grad():
            a, b = member.a.detach(), member.b.detach()
            crossed = self._without_bias(self.layer.forward_product(a.to(dtype))).T.to(b.dtype)
            # |W + B A|^2 = |W|^2 + sum of (2 W A^T + B A A^T) B, row by row
            added = torch.linalg.vecdot(torch.addmm(crossed, b, a @ a.T, beta=2), b)
            norms = added.add_(self.squares).clamp_min_(0).sqrt_()
        scale = self.dora.magnitude / norms
        # the node keeps its output alone; where that does not tell the input, `finish` scales
        if self.layer.bias() is None and not checkpointing() and bool(scale.all()):
            return replace(member, columns=scale)
        self._scale = scale
        return member

    def finish(self, out: Tensor) -> Tensor:
        """Return c * (out - b) + b, or what the node has scaled already."""
        scale, self._scale = self._scale, None  # which holds on to the graph
        if scale is None:
            return out
        scaled = times_columns(self._without_bias(out), scale)
        bias = self.layer.bias()
        return scaled if bias is None else scaled + bias.to(out.dtype)

    def _without_bias(self, out: Tensor) -> Tensor:
        bias = self.layer.bias()
        return out if bias is None else out - bias.to(out.dtype)


def site(host: Inlaid, name: str) -> Site | None:
    """Return the site of the named adapter here; None where a node does not compute it."""
    adapter = dict(host.adapters.items()).get(name)
    frozen = not any(p.requires_grad for p in host.base_layer.parameters())
    if not isinstance(host.base, Linear) or not frozen:
        return None
    if type(adapter) is Dora:
        # its dropout moves what the base computes too
        able = _is_thin(adapter.lora) and not _rate(adapter.lora)
        return DoraSite(host, adapter) if able else None
    return Site(host, adapter) if isinstance(adapter, Delta) and _is_thin(adapter) else None


def _is_thin(adapter: Delta) -> bool:
    own = type(adapter)
    plain = own.forward is Delta.forward and own.change is Delta.change
    thin = own.update in (Delta.update, Lora.update)
    # of a start that is subtracted nothing is dropped out
    started = getattr(adapter, "start_A", None) is not None and _rate(adapter)
    fits = plain and thin and adapter.bias is None and not started
    return fits and adapter.factors(torch.float32) is not None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _rate(adapter: Delta) -> float:
    """Return with what probability the adapter zeroes an input in training."""
    field = adapter.drops or ("lora_dropout" if isinstance(adapter, Lora) else "")
    return float(getattr(adapter.config, field)) if field else 0.0
