"""A linear layer with its frozen weight in 4 or 8 bits: y = x W^T + b, W dequantized as it runs.

QLoRA (Dettmers et al., arXiv:2305.14314); the codes are those of `kernels.codec`.  O output
features, I input features.  Neither pass keeps the dequantized weight: each makes it again, on the
CPU in a buffer that all layers share.  The state dict has the keys of bitsandbytes' 4-bit layers,
so a checkpoint of either is one of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.bases.plain import Linear
from inlay.core.base import Layer, PackedModule, store
from inlay.kernels import codec, matmul
from inlay.kernels.codec import Packed
from inlay.kernels.scratch import SCRATCH

NAMES = ("absmax", "nested_absmax")
"""The buffers beside the codes: float32 or 8 bits, never cast with the model."""
STATE = "weight.quant_state.bitsandbytes__"
"""The key, less the kind, under which a state dict holds what is no tensor, as JSON in bytes."""


class PackedLinear(nn.Linear, PackedModule):
    """`nn.Linear` with its weight in codes.

    weight uint8 [ceil(O*I/2), 1]; absmax [blocks], and nested_absmax [ceil(blocks/256)] where those
    are quantized too. In int8, weight int8 [O, I] and absmax [O]. While an adapter is merged,
    `dense` [O, I] stands in for them all.
    """

    dense: nn.Parameter | None
    absmax: Tensor
    nested_absmax: Tensor | None
    like: Tensor

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
        nn.Module.__init__(self)
        codec.check_kind(kind)
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.block, self.offset = kind, block, 0.0
        n = in_features * out_features
        empty, room = torch.empty, ((n + 1) // 2, 1)
        if kind == codec.INT8:  # a block is a row
            self.block, double, room = in_features, False, (out_features, in_features)
        blocks, stored = -(-n // self.block), _stored(kind)
        self.register_buffer("weight", empty(room, dtype=stored, device=device))
        scales = empty(blocks, dtype=torch.uint8 if double else torch.float32, device=device)
        nested = empty(-(-blocks // codec.NESTED), device=device) if double else None
        # persistent, though the state dict holds them by other names: transformers makes anew what
        # is not, when it has loaded a model
        self.register_buffer("absmax", scales)
        self.register_buffer("nested_absmax", nested)
        # holds no values: it is moved and cast with the model, and so knows what to compute in
        self.register_buffer("like", empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("dense", None)
        own = empty(out_features, dtype=dtype, device=device) if bias else None
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
    def compute_dtype(self) -> torch.dtype:
        """What the weight is dequantized to: that of the model."""
        return self.like.dtype

    @property
    def numel(self) -> int:
        """How many values the weight has; none while a merged one stands in for it."""
        return 0 if self.dense is not None else self.in_features * self.out_features

    @property
    def packed(self) -> Packed:
        """The codes and what turns them into the weight [O, I]; nothing is copied."""
        shape = (self.out_features, self.in_features)
        codes, nested = self.weight.view(torch.uint8).view(-1), self.nested_absmax
        return Packed(codes, self.absmax, self.kind, self.block, shape, nested, self.offset)

    def pack(self, weight: Tensor) -> None:
        """Take the weight [O, I], in codes, on its device."""
        double = self.nested_absmax is not None
        block = 64 if self.kind == codec.INT8 else self.block
        self.take(codec.quantize(weight.contiguous(), self.kind, block, double))

    def take(self, packed: Packed) -> None:
        """Take the codes of a weight [O, I]."""
        assert packed.shape == (self.out_features, self.in_features)
        room = packed.shape if packed.kind == codec.INT8 else (-1, 1)
        self.weight = packed.codes.view(_stored(packed.kind)).view(room)
        self.absmax, self.nested_absmax = packed.absmax, packed.nested
        self.kind, self.block, self.offset = packed.kind, packed.block, packed.offset
        self.like = self.like.new_empty(0, device=packed.codes.device)

    def unpacked(self) -> nn.Linear:
        """Return the plain layer: of what was merged, or of the dequantized weight."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.dense
        if weight is None:
            numbers = codec.dequantize(self.packed, dtype=self.compute_dtype)
            weight = nn.Parameter(numbers, requires_grad=False)
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
        out = cast(Tensor, product(input.to(dtype), bias, self, dtype))
        return out if automatic else out.to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as any module does, but for the magnitudes, which are moved and never cast."""
        before = {name: self._buffers[name] for name in NAMES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in NAMES:
            destination.pop(f"{prefix}{name}", None)
        dense = destination.pop(f"{prefix}dense", None)
        if dense is not None:
            destination[f"{prefix}weight"] = dense
        elif not self.weight.is_meta:
            destination.update({f"{prefix}{key}": value for key, value in self.parts().items()})

    def parts(self) -> dict[str, Tensor]:
        """Return what a state dict holds beside `weight`, as bitsandbytes names it."""
        where = self.weight.device
        if self.kind == codec.INT8:
            row_by_row = torch.tensor(0, dtype=torch.uint8, device=where)
            return {"SCB": self.absmax, "weight_format": row_by_row}
        told: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        found = {"absmax": self.absmax, "quant_map": codec.table(self.kind).to(where, copy=True)}
        if self.nested_absmax is not None:
            found["nested_absmax"] = self.nested_absmax
            # a copy, for safetensors refuses tensors that share their memory
            found["nested_quant_map"] = codec.dynamic_map(torch.device("cpu")).to(where, copy=True)
            told |= {"nested_blocksize": codec.NESTED, "nested_dtype": "float32"}
            told["nested_offset"] = self.offset
        text = list(json.dumps(told).encode())
        state = torch.tensor(text, dtype=torch.uint8, device=where)
        return {f"weight.{n}": t for n, t in found.items()} | {f"{STATE}{self.kind}": state}

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


def read(codes: Tensor, parts: dict[str, Tensor]) -> Packed:
    """Return the packed weight that a state dict holds as `codes` and what stands beside them.

    parts: by the names of `PackedLinear.parts`. ValueError where they do not go together.
    """
    if "SCB" in parts:
        return _read_rows(codes, parts["SCB"], parts.get("weight_format"))
    states = [tensor for key, tensor in parts.items() if key.startswith(STATE)]
    try:
        told = json.loads(bytes(states[0].tolist()))
        kind, block, shape = str(told["quant_type"]), int(told["blocksize"]), told["shape"]
        absmax = parts["weight.absmax"]
        nested = parts.get("weight.nested_absmax")
        offset = 0.0 if nested is None else float(told["nested_offset"])
        outer = codec.NESTED if nested is None else int(told["nested_blocksize"])
        n = math.prod(shape)
    except (KeyError, IndexError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its quantization state cannot be read ({error!r})") from None
    codec.check_kind(kind)
    blocks = -(-n // block) if block in codec.BLOCKS else -1
    codes = codes.view(torch.uint8).reshape(-1)
    wanted = torch.float32 if nested is None else torch.uint8
    if (len(codes), absmax.numel(), absmax.dtype) != ((n + 1) // 2, blocks, wanted):
        raise ValueError(f"its codes or magnitudes are not those of {list(shape)} in {block}s")
    if nested is not None and (outer, nested.numel()) != (codec.NESTED, -(-blocks // outer)):
        raise ValueError(f"its nested blocks of {outer} are not of {codec.NESTED}")
    where = codes.device
    scales = absmax.to(where, copy=True).reshape(-1)
    outermost = None if nested is None else nested.to(where, torch.float32, copy=True).reshape(-1)
    return Packed(codes.clone(), scales, kind, block, tuple(shape), outermost, offset)


def _read_rows(codes: Tensor, absmax: Tensor, layout: Tensor | None) -> Packed:
    if layout is not None and int(layout) != 0:
        raise ValueError(f"its rows are laid out as number {int(layout)} of bitsandbytes, not 0")
    if codes.dtype != torch.int8 or codes.ndim != 2 or absmax.numel() != len(codes):
        raise ValueError(f"its codes {list(codes.shape)} or magnitudes are not those of int8")
    scales = absmax.to(codes.device, torch.float32, copy=True).reshape(-1)
    flat = codes.clone().view(torch.uint8).view(-1)
    return Packed(flat, scales, codec.INT8, codes.shape[1], tuple(codes.shape))


def _stored(kind: str) -> torch.dtype:
    return torch.int8 if kind == codec.INT8 else torch.uint8


class _Product(torch.autograd.Function):
    """x W^T + b, keeping neither x nor W: the gradient of x asks for W alone, made anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, module: PackedLinear, dtype: torch.dtype
    ) -> Tensor:
        """Return x W^T + b."""
        ctx.module, ctx.dtype = module, dtype
        return F.linear(x, _numbers(module.packed, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x and of the bias, where these are wanted."""
        (grad,) = grads
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = grad @ _numbers(ctx.module.packed, ctx.dtype)
        if ctx.needs_input_grad[1]:
            bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x, bias, None, None


def _numbers(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight [O, I]; on the CPU in this thread's buffer, until the next call."""
    if packed.codes.device.type != "cpu":
        # an accelerator's allocator keeps freed memory, and knows which stream is done with it
        return codec.dequantize(packed, dtype=dtype)
    return codec.dequantize(packed, SCRATCH.take(dtype, math.prod(packed.shape)))


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
        return codec.dequantize(self.module.packed, dtype=self.dtype)

    def forward_product(self, x: Tensor) -> Tensor:
        """Return x W^T + b [N, O] of x [N, I], computed in its dtype; no gradient is noted."""
        bias = self.bias()
        weight = _numbers(self.module.packed, x.dtype)
        return matmul.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def backward_product(self, grad: Tensor) -> Tensor:
        """Return grad W [N, I] of grad [N, O], computed in its dtype; no gradient is noted."""
        return matmul.product(grad, _numbers(self.module.packed, grad.dtype))

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
