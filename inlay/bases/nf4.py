"""A linear layer with its frozen weight in 4 or 8 bits: y = x W^T + b, W dequantized as it runs.

QLoRA (Dettmers et al., arXiv:2305.14314); the codes are those of `kernels.codec`.  O output
features, I input features.  Neither pass keeps the dequantized weight: each makes it again, a panel
at a time or in a buffer that all layers share (`kernels.products`).  The state dict has the keys of
bitsandbytes' 4-bit layers, so a checkpoint of either is one of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.bases._packed import NAMES, PackedTensor, read
from inlay.bases.plain import Linear
from inlay.core.base import Layer, PackedModule, store
from inlay.kernels import products


class PackedLinear(nn.Linear, PackedTensor, PackedModule):
    """`nn.Linear` with its weight in codes.

    weight uint8 [ceil(O*I/2), 1]; absmax [blocks], and nested_absmax [ceil(blocks/256)] where those
    are quantized too. In int8, weight int8 [O, I] and absmax [O]. While an adapter is merged,
    `dense` [O, I] stands in for them all.
    """

    dense: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str = "nf4",
        block: int = 64,
        double: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for the codes; `pack` or a state dict fills it. dtype: what it computes in."""
        settings: dict[str, Any] = {"kind": kind, "block": block, "double": double}
        shape = out_features, in_features
        PackedTensor.__init__(self, shape, dtype=dtype, device=device, **settings)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("dense", None)
        own = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", own if own is None else nn.Parameter(own, False))

    @classmethod
    def of(
        cls, linear: nn.Linear, kind: str = "nf4", *, block: int = 64, double: bool = True
    ) -> Self:
        """Return the layer with the weight of `linear` in codes; the bias is the same parameter."""
        o, i = linear.weight.shape
        settings: dict[str, Any] = {"kind": kind, "block": block, "double": double}
        made = cls(i, o, bias=False, dtype=linear.weight.dtype, device="meta", **settings)
        made.pack(linear.weight)
        made.register_parameter("bias", linear.bias)
        return made.train(linear.training)

    @property
    def numel(self) -> int:
        """How many values the weight has; none while a merged one stands in for it."""
        return 0 if self.dense is not None else self.in_features * self.out_features

    def unpacked(self) -> nn.Linear:
        """Return the plain layer: of what was merged, or of the dequantized weight."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.dense
        if weight is None:
            weight = nn.Parameter(self.numbers(), requires_grad=False)
        made.weight = weight
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return made.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b, computed in the model's dtype (or autocast's) and cast back."""
        where = input.device.type
        automatic = torch.is_autocast_enabled(where)
        dtype = torch.get_autocast_dtype(where) if automatic else self.compute_dtype
        if self.dense is not None:
            return F.linear(input, self.dense, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Any = _Product.apply
        rows = input.to(dtype).reshape(-1, self.in_features)
        # shaped out here: autograd lets no one write into a view that a function returned
        out = cast(Tensor, product(rows, bias, self).view(*input.shape[:-1], self.out_features))
        return out if automatic else out.to(input.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in NAMES:
            destination.pop(f"{prefix}{name}", None)
        dense = destination.pop(f"{prefix}dense", None)
        if dense is not None:
            destination[f"{prefix}weight"] = dense
        elif not self.weight.is_meta:
            destination.update({f"{prefix}{key}": value for key, value in self.parts().items()})

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
        rows = {f"{prefix}SCB", f"{prefix}weight_format"}
        own = {k for k in state_dict if k.startswith(f"{prefix}weight.") or k in rows}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        beside = {f"{prefix}{name}" for name in NAMES}
        missing_keys[:] = [key for key in missing_keys if key not in beside]
        if f"{prefix}weight" not in state_dict:
            return
        parts = {key.removeprefix(prefix): state_dict[key] for key in own}
        try:
            self.take(read(state_dict[f"{prefix}weight"].to(self.weight.device), parts))
        except (ValueError, AssertionError) as error:
            error_msgs.append(f"{prefix}weight is no packed weight of this layer: {error}")


class _Product(torch.autograd.Function):
    """x W^T + b, keeping neither x nor W: the gradient of x asks for W alone, made anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: PackedLinear) -> Tensor:
        """Return x W^T + b [N, O] of x [N, I]."""
        ctx.module = module
        return products.linear(x, module.packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x and of the bias, where these are wanted."""
        (grad,) = grads
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = products.product(grad, ctx.module.packed)
        if ctx.needs_input_grad[1]:
            bias = grad.sum(0)
        return x, bias, None


class Nf4(Linear):
    """A `PackedLinear` of any kind as adapters see it: a linear with the dequantized weight."""

    module: PackedLinear

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a linear in 4-bit codes."""
        return isinstance(module, PackedLinear)

    @property
    def unpacked(self) -> type[Layer]:
        """The view of a plain linear."""
        return Linear

    def weight(self) -> Tensor:
        """Return W [O, I]: dequantized anew, or what was merged."""
        if self.module.dense is not None:
            return self.module.dense
        return self.module.numbers()

    def forward_product(self, x: Tensor) -> Tensor:
        """Return x W^T + b [N, O] of x [N, I], computed in its dtype; no gradient is noted."""
        bias = self.bias()
        return products.linear(x, self.module.packed, None if bias is None else bias.to(x.dtype))

    def backward_product(self, grad: Tensor) -> Tensor:
        """Return grad W [N, I] of grad [N, O], computed in its dtype; no gradient is noted."""
        return products.product(grad, self.module.packed)

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Let weight [O, I] stand in for the codes, and put bias [O] in place."""
        dense = weight.detach().to(self.device, self.dtype).contiguous()
        self.module.register_parameter("dense", nn.Parameter(dense, requires_grad=False))
        store(self.module, bias=bias)

    def settled(self) -> nn.Module:
        """Return a plain linear where a weight was stored, else the packed layer."""
        return self.module if self.module.dense is None else self.module.unpacked()

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return self.module.compute_dtype


def _sample(
    in_features: int, out_features: int, *, bias: bool, kind: str = "nf4"
) -> tuple[nn.Module, Tensor]:
    linear = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(linear.weight)
    return PackedLinear.of(linear, kind), torch.randn(3, 4, in_features, dtype=torch.float64)


LAYERS: tuple[type[Layer], ...] = (Nf4,)
"""The view this file gives."""
SAMPLES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "nf4": lambda: _sample(8, 4, bias=True),
    "nf4 without bias": lambda: _sample(6, 5, bias=False),
    "int8": lambda: _sample(6, 5, bias=True, kind="int8"),
}
"""What the laws are tried on."""
