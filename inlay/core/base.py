"""The frozen layer an adapter is set into, seen through one interface.

O output features, I input features, R rank.  A weight is [O, I] whatever the layer stores: a linear
[out, in], a conv [out, in*k*k], an embedding [dim, vocab]; a norm has the vector [O] alone.  Each
kind of layer implements this once, in `inlay.bases`; methods and quantizers then never meet.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "conv", "embedding", "norm", "module"]


class Base(ABC):
    """What an adapter may ask of the layer below it: a real layer, or a layer already adapted."""

    kind: Kind
    module: nn.Module
    shape: tuple[int, int]
    path: str = ""
    """The module's path in its model, where it is known."""

    @abstractmethod
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer computes now, with whatever lies below."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight [O, I] (a norm: [O]), dequantized; TypeError where there is none."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """Return the bias [O], or None."""

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's own operator on x with another weight [O, I] and bias [O]."""

    @abstractmethod
    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return the layer's operator with A [R, I] for its weight: R features or channels."""

    @abstractmethod
    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return B [O, R] applied to the R features or channels of h."""

    @abstractmethod
    def spread(self, vector: Tensor) -> Tensor:
        """Return `vector` [O], shaped to broadcast over the output; TypeError where none does."""

    @property
    def features(self) -> tuple[int, int]:
        """The widths (O, I) of output and input; a block of layers has them too.

        UserError where they cannot be told.
        """
        return self.shape

    @property
    def bits(self) -> int | None:
        """How many bits a value of the layer's weight has where it is packed; else None."""
        return self.module.bits if isinstance(self.module, PackedModule) else None

    def file_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B of rank r in PEFT's files: matrices, but for a conv."""
        out_features, in_features = self.shape
        return (r, in_features), (out_features, r)

    @property
    def device(self) -> torch.device:
        """The device of the layer's first parameter."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's first parameter."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The dtype of an adapter's own parameters here: the weight's, but never below float32."""
        dtype = self.dtype
        # below float32, an update of lr * grad is often lost in the parameter's own rounding
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Layer(Base):
    """A real layer: a view of `module`, the leaf every stack of adapters stands on."""

    def __init__(self, module: nn.Module) -> None:
        """View `module`; nothing is copied and nothing is changed."""
        self.module = module

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether this class is the view of `module`."""

    @property
    def reason(self) -> str:
        """Why this layer's weight cannot be adapted, where there is more to say than its kind."""
        return ""

    @abstractmethod
    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the layer new parameters of weight [O, I] and bias; the old ones stay untouched.

        Used by merge only. New `Parameter` objects are made, so that a tied weight is untied, not
        changed.
        """

    @property
    def unpacked(self) -> type[Layer]:
        """The view of this layer's module once its weight stands in plain numbers."""
        return type(self)

    def settled(self) -> nn.Module:
        """Return the plain module that stays here, once what was stored is stored for good."""
        return self.module

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes."""
        return self.module(x, *args, **kwargs)

    def bias(self) -> Tensor | None:
        """Return the module's bias [O], or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def spread(self, vector: Tensor) -> Tensor:
        """Return `vector`: most layers put their features last."""
        return vector


class Host(nn.Module):
    """A module in a layer's place, with that layer inside it as `base_layer`."""

    base_layer: nn.Module


class PackedModule(nn.Module, ABC):
    """A layer whose frozen weight is kept in buffers, in fewer bits than it computes with."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """How many values the packed weight has; none while a merged one stands in for it."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """How many bits a value of the packed weight has."""

    @property
    def stacks(self) -> Mapping[str, torch.Size]:
        """The shapes of the packed ones among the parameters it holds in no layer (`core.raw`)."""
        return {}

    @abstractmethod
    def unpacked(self) -> nn.Module:
        """Return the plain layer of the same numbers, with new parameters that do not train."""


def is_bare(module: nn.Module) -> bool:
    """Return whether a call of `module` is its class's `forward` and no more: no hook hears of it.

    Only then may what it computes be computed without calling it.
    """
    heard = (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
    return not heard and "forward" not in vars(module)


def bare_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` as before any adapter: hosts inside give way to their layers.

    A packed weight is copied as plain numbers, for a copy is there to be trained.
    """
    copies: dict[int, Any] = {}
    for inner in reversed(
        list(module.modules())
    ):  # the deepest first, so that each finds its own inside
        if isinstance(inner, PackedModule):
            copies[id(inner)] = inner.unpacked()
        elif isinstance(inner, Host):
            copies[id(inner)] = copy.deepcopy(inner.base_layer, copies)
    return copy.deepcopy(module, copies)


def store(module: nn.Module, **tensors: Tensor | None) -> None:
    """Replace parameters of `module` by new ones, in the dtype and on the device of the old."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        old = getattr(module, name, None)
        like = old if isinstance(old, Tensor) else next(module.parameters())
        new = nn.Parameter(
            tensor.detach().to(like.device, like.dtype).contiguous(), requires_grad=False
        )
        module.register_parameter(name, new)
