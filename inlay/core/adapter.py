"""An adapter takes a frozen layer and yields a layer.

It says this twice, and one law ties the two (dropout off):

    forward(base, x)   how it is computed
    reweight(W, b)     what it means
    law 1:             forward(base, x) == base.apply(x, *reweight(base.weight(), base.bias()))

Everything else (stacks, merging, mixed batches, files) is written once, from these two.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.base import Base, Kind
from inlay.core.config import AdapterConfig
from inlay.core.selection import Selection


class Shared(nn.Module):
    """What all sites of one adapter hold in common: trained parameters, or frozen buffers.

    It is a module of the first adapter that takes it (`owned` from then on), and of no other: so it
    is moved, copied, counted and saved once.
    """

    owned = False
    taken = 0
    """How many adapters have taken it so far."""
    lent_as: ClassVar[str] = "common"
    """Its name in the adapter that owns it."""

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's file key under `base_model.` -> (name here, shape in the file)."""
        return {}

    def ahead(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], selection: Selection
    ) -> Mapping[str, Tensor]:
        """Return what is said to the adapters in a call of the whole model (see `Selection.said`).

        args, kwargs: what the model is called with; this may call it for itself first.
        """
        del model, args, kwargs, selection
        return {}

    def complete(self) -> None:
        """Make what no file holds, once a file's tensors are in their places."""


class Adapter(nn.Module, ABC):
    """A trainable part set into one layer."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding", "norm", "module"})
    """The kinds of layer this method's mathematics holds for."""
    carries: ClassVar[bool] = True
    """Whether a file of this method holds the whole embedding below it too, as PEFT's mostly do."""
    starts_neutral: ClassVar[bool] = True
    """Whether an adapter of default settings changes nothing until it is trained."""
    sees_rows: ClassVar[bool] = False
    """Whether it computes something of each row as a whole, so that packed rows would share it."""
    frozen: tuple[str, ...] = ()
    """Names of parameters that never train."""
    computed: ClassVar[tuple[str, ...]] = ()
    """Names in `keys` that are no parameters: computed of them for a file, and taken by `fill`."""
    placed: ClassVar[int] = 0
    """How many parameters were ever put into adapters: when it moves, lists of them may be old."""
    _held: tuple[Shared, ...] = ()
    number: int = 0
    """Which of the sites that hold something in common this one is, in the model's order."""
    selection: Selection | None = None
    """That of the model, where the adapter is set into one: what a call says stands there."""

    def __init__(
        self,
        config: AdapterConfig,
        base: Base,
        *,
        device: torch.device | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Make the parameters, uninitialized, on `device` (default: the base's).

        shared: what the sites have in common; where a method has such, one alone makes its own.
        """
        super().__init__()
        self.config = config
        self._device, self._dtype = device or base.device, base.adapter_dtype
        self.make(base)
        shared = shared or self.share(config, [base], device=device)
        if shared is not None:
            self.hold(shared)
        if self._device.type != "meta":
            self.complete(base)

    def make(self, base: Base) -> None:
        """Make the parameters for `base`; UserError where the settings do not fit the layer."""
        del base

    @classmethod
    def share(
        cls, config: Any, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared | None:
        """Return what the sites on `bases` hold in common, made and initialized; most: None."""
        del config, bases, device
        return None

    def hold(self, shared: Shared) -> None:
        """Take `shared` to compute with; the first adapter that takes it owns it."""
        # in a tuple, which registers nothing: a module of every site would be saved by each
        self._held = (shared,)
        self.number, shared.taken = shared.taken, shared.taken + 1
        if not shared.owned:
            shared.owned = True
            self.add_module(Shared.lent_as, shared)

    def complete(self, base: Base) -> None:
        """Make what no file holds: when the adapter is made, or once a file's tensors are in it."""
        del base

    def beside(self, adapters: nn.ModuleDict) -> None:
        """Take note of all adapters by name of the host that this one is set into."""
        del adapters

    def follow(self, other: Adapter) -> None:
        """Take note of the adapter at another site, where this one computes with that."""
        del other

    def parameter(self, *shape: int) -> nn.Parameter:
        """Return an uninitialized parameter in the adapter's dtype and on its device."""
        return nn.Parameter(torch.empty(shape, device=self._device, dtype=self._dtype))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the parameters train or not, as any module does; those that are `frozen` never."""
        super().requires_grad_(requires_grad)
        for name in self.frozen:
            self.get_parameter(name).requires_grad = False
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as any module does; counted where it is a parameter."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            Adapter.placed += 1

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as any module does; counted."""
        super().register_parameter(name, param)
        Adapter.placed += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as any module does (`to`, `to_empty`); counted, for new parameters may result."""
        Adapter.placed += 1
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset(self, base: Base) -> None:
        """Initialize the parameters, so that the adapted layer computes what the base does."""
        del base

    @abstractmethod
    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the adapted layer computes."""

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's file key -> (parameter name, shape in the file), relative to the site.

        A file's tensor is the parameter reshaped: both hold the same numbers in the same order.
        """
        del base
        return {
            name: (name, tuple(p.shape))
            for name, p in self.named_parameters()
            if not name.startswith(f"{Shared.lent_as}.")
        }

    def lent(self) -> dict[str, Tensor]:
        """Return what a file holds of a head tied to this one's embedding, by PEFT's keys there."""
        return {}

    def fill(self, name: str, value: Tensor) -> None:
        """Take what a file holds by a name in `computed`, in the place of what computes it."""
        raise NotImplementedError(name)

    def penalty(self) -> Tensor | None:
        """Return what its settings add to the loss of a training step; most: None."""
        return None

    def unsaved(self) -> dict[str, Tensor]:
        """Return what no file of PEFT's holds, though training goes on with it, by names."""
        return {}

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Take what `unsaved` gave, once a file's tensors are in their places."""
        del tensors


class Reweight(Adapter):
    """W, b -> W', b': an adapter whose whole meaning is another weight."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding", "norm"})

    @abstractmethod
    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted weight and bias, computed in the dtype of `weight`."""

    keeps_bias: ClassVar[bool] = False
    """Whether the adapted bias is the base's."""

    def rebias(self, base: Base) -> Tensor | None:
        """Return the adapted bias alone; a method that can say it without the weight does so."""
        if self.keeps_bias:
            return base.bias()
        return self.reweight(base.weight(), base.bias())[1]

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's operator with the adapted weight: correct for all, cheap for some."""
        if args or kwargs:
            raise TypeError(
                f"{type(base.module).__name__} is called with more than its input, which "
                f"{type(self).__name__} cannot pass on"
            )
        return base.apply(x, *self.reweight(base.weight(), base.bias()))


class Delta(Reweight):
    """W -> W + delta: an additive adapter. The base is only called, so it may stay packed.

    Where the configuration trains biases (`bias` "all" or the method's own), the bias is a full
    copy of the base's.
    """

    on: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    bias: nn.Parameter | None

    def __init__(
        self,
        config: AdapterConfig,
        base: Base,
        *,
        device: torch.device | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Make the parameters, and the bias where it is to be trained."""
        super().__init__(config, base, device=device, shared=shared)
        trained = getattr(config, "bias", "none") != "none" and base.bias() is not None
        self.bias = self.parameter(base.shape[0]) if trained else None

    drops: ClassVar[str] = ""
    """The field of the settings that says with what probability an input is zeroed in training."""

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return B [O, R] and A [R, I] whose product is the delta, where it is one of thin two."""
        del dtype
        return None

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I] of the weight, computed in `dtype`: B A, or the method's own."""
        b, a = self.factors(dtype)  # type: ignore[misc]
        return b @ a

    def update(self, base: Base, x: Any) -> Tensor:
        """Return what the update adds to the output, without making the delta if that is less."""
        x = self.dropped(x)
        thin = self.factors(self.dtype)
        if thin is None:
            return base.apply(x, self.delta(self.dtype))
        return base.up(base.down(x, thin[1]), thin[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's own parameters."""
        return next(p for p in self._parameters.values() if p is not None).dtype

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input of the update, in its dtype and in training with dropout; ids as are."""
        if not x.is_floating_point():
            return x
        x = x.to(self.dtype)
        rate = getattr(self.config, self.drops) if self.drops else 0.0
        # at 0 torch would still draw a mask and keep it
        return F.dropout(x, rate, self.training) if rate else x

    def reset(self, base: Base) -> None:
        """Start the trained bias from the base's."""
        below = base.bias()
        if self.bias is not None and below is not None:
            with torch.no_grad():
                self.bias.copy_(below)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + delta, and the trained bias where there is one."""
        own = bias if self.bias is None else self.bias.to(weight.dtype)
        return weight + self.delta(weight.dtype), own

    def rebias(self, base: Base) -> Tensor | None:
        """Return the trained bias, or the one below."""
        return base.bias() if self.bias is None else self.bias

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) plus the update's share, in the dtype of base(x)."""
        below = base(x, *args, **kwargs)
        return (below + self.change(base, x)).to(below.dtype)

    def change(self, base: Base, x: Any) -> Tensor:
        """Return all that the adapter adds to base(x): the update, and the bias's change."""
        out = self.update(base, x)
        if self.bias is None:
            return out
        return out + base.spread(self.bias - base.bias())  # type: ignore[operator]

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's keys; a trained bias stands under the base layer's name."""
        found = super().keys(base)
        if self.bias is not None:
            found["base_layer.bias"] = found.pop("bias")
        return found


class Wrap(Adapter):
    """An adapter that no weight can say; merging refuses it by name."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method: its configuration, and the adapter at each target (None: no host)."""

    config: type[AdapterConfig]
    adapter: type[Adapter] | None
    choose: Callable[[Any], type[Adapter]] | None = None
    """What returns another adapter for some configurations, where the method has more than one."""

    def of(self, config: AdapterConfig) -> type[Adapter] | None:
        """Return the adapter that `config` means."""
        return self.adapter if self.choose is None else self.choose(config)
