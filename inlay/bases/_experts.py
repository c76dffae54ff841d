"""A mixture's experts with their matrices in 4 or 8 bits: stacks that no layer holds.

E experts, S rows, T tokens, K experts a token.  A stack is [E, O, I], or [E, I, O] where the module
says it `is_transposed`.  An expert's matrix is dequantized when its rows are multiplied, and again
for their gradient; a module that does something else with its stacks gets them whole for the length
of a call.  The state dict has the keys of `bitsandbytes.nn.parametrize`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases._packed import STATE, PackedTensor, read
from inlay.core.base import PackedModule
from inlay.core.raw import called, raw
from inlay.kernels import codec, products
from inlay.kernels.codec import Packed

HOLDER = "packed_"
"""What stands before a parameter's name in the name of the module that has its codes."""


class Stack(PackedTensor):
    """The codes of one parameter; its module says what a state dict holds of them."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class PackedExperts(PackedModule):
    """What is put before the class of a module of experts, some of whose parameters are packed.

    Their names stay in `_parameters`, without a value, or with the one that was merged: it stands
    in for the codes. As attributes they are dequantized.
    """

    def stack(self, name: str) -> Stack | None:
        """Return the codes of a parameter, where it has such."""
        found = self._modules.get(f"{HOLDER}{name}")
        return found if isinstance(found, Stack) else None

    @property
    def stacks(self) -> Mapping[str, torch.Size]:
        """The shapes of the packed parameters by name."""
        held = {name.removeprefix(HOLDER): m for name, m in self._modules.items()}
        return {name: m.shape for name, m in held.items() if isinstance(m, Stack)}

    @property
    def in_codes(self) -> list[str]:
        """The names of those in whose place nothing stands."""
        return [name for name in self.stacks if self._parameters.get(name) is None]

    @property
    def numel(self) -> int:
        """How many values the codes stand for, but for those that merged ones stand in for."""
        return sum(self.stacks[name].numel() for name in self.in_codes)

    @property
    def bits(self) -> int:
        """How many bits a value of them has."""
        return next(m.bits for m in self.children() if isinstance(m, Stack))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the stacks are dequantized to."""
        return next(m.compute_dtype for m in self.children() if isinstance(m, Stack))

    def numbers(self, name: str) -> Tensor:
        """Return a packed parameter as numbers: dequantized anew, or what was merged."""
        dense, stack = self._parameters.get(name), self.stack(name)
        if dense is not None:
            return dense
        assert stack is not None
        if stack.weight.is_meta:
            # a parameter, for transformers looks for one where a checkpoint has nothing
            room = torch.empty(stack.shape, dtype=stack.compute_dtype, device="meta")
            return nn.Parameter(room, requires_grad=False)
        return stack.numbers()

    def settle(self) -> None:
        """Be plain again where plain parameters were read, and codes for none of them."""
        for name in set(self.stacks).difference(self.in_codes):
            del self._modules[f"{HOLDER}{name}"]
        if not self.stacks:
            self.__class__ = type(self)._plain  # type: ignore[attr-defined]

    def unpacked(self) -> nn.Module:
        """Return the plain module of the same numbers, with new parameters that do not train."""
        plain: type[nn.Module] = type(self)._plain  # type: ignore[attr-defined]
        made = plain.__new__(plain)
        made.__dict__ = {**self.__dict__, "_parameters": {}, "_modules": {}}
        for name, parameter in self._parameters.items():
            value: Tensor | None = None if parameter is None else parameter.detach().clone()
            if name in self.stacks:
                value = self.numbers(name).detach()
            made._parameters[name] = None if value is None else nn.Parameter(value, False)
        made._modules |= {n: m for n, m in self._modules.items() if not isinstance(m, Stack)}
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes, an expert at a time where it is a plain mixture."""
        if not self.in_codes:
            return super().forward(*args, **kwargs)
        if len(args) == 3 and args[0].ndim == 2 and not kwargs and self._is_a_mixture():
            return self._mixed(*args)
        return called(self, partial(raw, self), args, kwargs)

    def _is_a_mixture(self) -> bool:
        """Return whether transformers says that it computes what `_mixed` does."""
        own: Any = self
        if not hasattr(own, "has_gate") or getattr(own, "_is_expert_parallel", False):
            return False
        first = "gate_up_proj" if own.has_gate else "up_proj"
        found = [self.stack(name) for name in (first, "down_proj") if name in self.in_codes]
        held = [m.packed for m in found if m is not None and len(m.shape) == 3]
        return len(held) == 2 and all(map(codec.divides, held))

    def _mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return sum_k w_tk expert_k(x_t) [T, I], of x [T, I], index [T, K] and weights [T, K]."""
        own: Any = self
        first = "gate_up_proj" if own.has_gate else "up_proj"
        out = torch.zeros_like(x)
        for expert in sorted(set(index.flatten().tolist())):
            tokens, place = torch.where(index == expert)
            h = self._projected(first, expert, x[tokens])
            h = own._apply_gate(h) if own.has_gate else own.act_fn(h)
            h = self._projected("down_proj", expert, h)
            if own.has_post_expert_norm:
                h = own.post_expert_norm(h)
            h = h * weights[tokens, place, None]
            out.index_add_(0, tokens, h.to(out.dtype))
        return out

    def _projected(self, name: str, expert: int, x: Tensor) -> Tensor:
        """Return rows [S, O] of x [S, I] by the expert's matrix, and its bias where it has one."""
        own: Any = self
        stack = self.stack(name)
        assert stack is not None
        where = x.device.type
        automatic = torch.is_autocast_enabled(where)
        dtype = torch.get_autocast_dtype(where) if automatic else stack.compute_dtype
        product: Any = _Product.apply
        out: Tensor = product(x.to(dtype), codec.one(stack.packed, expert), own.is_transposed)
        if own.has_bias:
            out = out + own.get_parameter(f"{name}_bias")[expert].to(dtype)
        return out if automatic else out.to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.in_codes:
            stack = self.stack(name)
            assert stack is not None
            destination[f"{prefix}{name}"] = stack.weight
            if not stack.weight.is_meta:
                parts = stack.parts().items()
                destination.update({f"{prefix}{under(name, k)}": v for k, v in parts})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given: dict[str, dict[str, Tensor]] = {}
        for name in self.in_codes:
            keys = {f"{prefix}{under(name, part)}": part for part in PARTS}
            given[name] = {part: state_dict[key] for key, part in keys.items() if key in state_dict}
            state_dict = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, parts in given.items():
            codes, stack = parts.pop("weight", None), self.stack(name)
            assert stack is not None
            if codes is None:
                missing_keys.append(f"{prefix}{name}")
                continue
            try:
                stack.take(read(codes.to(stack.weight.device), parts))
            except (ValueError, AssertionError) as error:
                error_msgs.append(f"{prefix}{name} is no packed stack of this module: {error}")


PARTS = (
    *("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax"),
    *(f"{STATE}{kind}" for kind in codec.TABLES),
    *("SCB", "weight_format", "weight"),
)
"""The keys of one packed weight in a file; the one that all end in comes last."""


def under(name: str, part: str) -> str:
    """Return the key of a part of the parameter `name`: those of a layer stand in for `weight`."""
    if part == "weight" or part.startswith("weight."):
        return part.replace("weight", name, 1)
    return part if name == "weight" else f"{name}.{part}"


def pack_parameters(
    module: nn.Module,
    names: Collection[str],
    kind: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    dtype: torch.dtype | None = None,
) -> PackedExperts:
    """Return `module` itself with the parameters of these names in codes of `kind`.

    Parameters without memory get room for theirs. dtype: what is computed in (default: their own).
    """
    plain: Any = type(module)
    module.__class__ = _packed_class(plain, tuple(names))
    assert isinstance(module, PackedExperts)
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        stack = Stack(
            parameter.shape,
            kind=kind,
            block=block,
            double=double,
            dtype=dtype or parameter.dtype,
            device="meta",
        )
        if not parameter.is_meta:
            stack.pack(parameter.detach())
        module._parameters[name] = None
        module.add_module(f"{HOLDER}{name}", stack)
    return module


@cache
def _packed_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def body(namespace: dict[str, Any]) -> None:
        namespace |= {"_plain": plain, "__module__": plain.__module__}
        for name in names:
            namespace[name] = property(_reader(name))

    return types.new_class(f"Packed{plain.__name__}", (PackedExperts, plain), exec_body=body)


def _reader(name: str) -> Callable[[PackedExperts], Tensor]:
    return lambda module: module.numbers(name)


class _Product(torch.autograd.Function):
    """x W^T, or x W of a transposed W, keeping neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, flipped: bool) -> Tensor:
        """Return the rows [S, O] of x [S, I]."""
        ctx.packed, ctx.flipped = packed, flipped
        return products.product(x, packed) if flipped else products.linear(x, packed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient of x."""
        (grad,) = grads
        other = products.linear if ctx.flipped else products.product
        return other(grad, ctx.packed), None, None
