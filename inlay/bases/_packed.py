"""A frozen tensor in 4 or 8 bits, and what a file holds of it: the keys of bitsandbytes.

QLoRA (Dettmers et al., arXiv:2305.14314); the codes are those of `kernels.codec`.  n values, in
blocks of 64; in int8 a block is a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from inlay.kernels import codec
from inlay.kernels.codec import Packed

NAMES = ("absmax", "nested_absmax")
"""The buffers beside the codes: float32 or 8 bits, never cast with the model."""
STATE = "weight.quant_state.bitsandbytes__"
"""The key, less the kind, under which a file holds what is no tensor, as JSON in bytes."""


class PackedTensor(nn.Module):
    """A tensor of any shape in codes.

    weight uint8 [ceil(n/2), 1]; absmax [blocks], and nested_absmax [ceil(blocks/256)] where those
    are quantized too. In int8, weight int8 in the tensor's shape and absmax a row.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    like: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        kind: str = "nf4",
        block: int = 64,
        double: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for the codes; `pack` or a file fills it. dtype: what it computes in."""
        nn.Module.__init__(self)
        codec.check_kind(kind)
        self.shape = torch.Size(shape)
        self.kind, self.block, self.offset = kind, block, 0.0
        n = self.shape.numel()
        empty = torch.empty
        room: tuple[int, ...] = ((n + 1) // 2, 1)
        if kind == codec.INT8:  # a block is a row
            self.block, double, room = self.shape[-1], False, tuple(shape)
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

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the codes are dequantized to: the dtype of the model."""
        return self.like.dtype

    @property
    def bits(self) -> int:
        """How many bits a value has."""
        return 8 if self.kind == codec.INT8 else 4

    @property
    def packed(self) -> Packed:
        """The codes and what turns them into the tensor; nothing is copied."""
        codes, nested = self.weight.view(torch.uint8).view(-1), self.nested_absmax
        shape = tuple(self.shape)
        return Packed(codes, self.absmax, self.kind, self.block, shape, nested, self.offset)

    def numbers(self) -> Tensor:
        """Return the tensor dequantized, in memory of its own."""
        return codec.dequantize(self.packed, dtype=self.compute_dtype)

    def pack(self, weight: Tensor) -> None:
        """Take the tensor, in codes, on its device."""
        double = self.nested_absmax is not None
        block = 64 if self.kind == codec.INT8 else self.block
        self.take(codec.quantize(weight.contiguous(), self.kind, block, double))

    def take(self, packed: Packed) -> None:
        """Take the codes of a tensor of this shape."""
        assert packed.shape == self.shape
        room = packed.shape if packed.kind == codec.INT8 else (-1, 1)
        self.weight = packed.codes.view(_stored(packed.kind)).view(room)
        self.absmax, self.nested_absmax = packed.absmax, packed.nested
        self.kind, self.block, self.offset = packed.kind, packed.block, packed.offset
        self.like = self.like.new_empty(0, device=packed.codes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as any module does, but for the magnitudes, which are moved and never cast."""
        before = {name: self._buffers[name] for name in NAMES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

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
            "shape": list(self.shape),
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


def read(codes: Tensor, parts: dict[str, Tensor]) -> Packed:
    """Return the packed weight that a state dict holds as `codes` and what stands beside them.

    parts: by the names of `PackedTensor.parts`. ValueError where they do not go together.
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
    whole = codes.dtype == torch.int8 and codes.ndim > 1
    if not whole or absmax.numel() * codes.shape[-1] != codes.numel():
        raise ValueError(f"its codes {list(codes.shape)} or magnitudes are not those of int8")
    scales = absmax.to(codes.device, torch.float32, copy=True).reshape(-1)
    flat = codes.clone().view(torch.uint8).view(-1)
    return Packed(flat, scales, codec.INT8, codes.shape[-1], tuple(codes.shape))


def _stored(kind: str) -> torch.dtype:
    return torch.int8 if kind == codec.INT8 else torch.uint8
