"""Weights in 4 or 8 bits: value = table[code] * absmax of its block (QLoRA, arXiv:2305.14314).

A weight of n values, row by row, is cut into blocks; each is divided by its largest magnitude and
every quotient becomes the code of the nearest of 16 values.  Two codes make a byte, the first in
the high half.  The magnitudes ("absmax", float32) may be quantized in turn, less their mean, to 8
bits in blocks of 256 (double quantization): map[byte] * nested + offset.  Codes, absmax and nested
state are to the bit those that bitsandbytes computes on the CPU, which the tests hold it to.

In int8 a block is a row, and value = code * absmax / 127.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from inlay.core.errors import UserError, nearest
from inlay.kernels import nf4 as compiled

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of a block that bitsandbytes has too."""
NESTED = 256
"""Magnitudes that share a second one in double quantization."""
STEPS = 1 << 16
"""Steps from -1 to 1 that a magnitude is rounded to before its 8-bit code is looked up."""
CELLS = 1024
"""Parts of [-1, 1], small enough that no two of a table's middles share one."""
PIECE = 1 << 20
"""Values worked on at a time, so that what is computed on the way stays at a few megabytes."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution scaled to [-1, 1], with 0 exact (the paper's appendix E)."""
# sign, two bits of exponent and one of mantissa, by bit pattern and divided by 12
_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _MAGNITUDES)
TABLES = {"nf4": NF4, "fp4": FP4}
INT8 = "int8"
KINDS = (*TABLES, INT8)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight of `shape` in codes, and what turns them into numbers again.

    codes uint8 [ceil(n/2)] (int8: [n]); absmax float32 [blocks], or with double quantization uint8
    [blocks] and nested float32 [ceil(blocks/256)]; offset is added to each of the dequantized ones.
    """

    codes: Tensor
    absmax: Tensor
    kind: str
    block: int
    shape: tuple[int, ...]
    nested: Tensor | None = None
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """The memory of the codes and the magnitudes."""
        return sum(t.nbytes for t in (self.codes, self.absmax, self.nested) if t is not None)


def check_kind(kind: str) -> None:
    """Raise UserError where there are no such codes."""
    if kind not in KINDS:
        raise UserError(
            f"quantization kind {kind!r} is not one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )


def quantize(weight: Tensor, kind: str = "nf4", block: int = 64, double: bool = True) -> Packed:
    """Return `weight` in codes of `kind`, computed a piece at a time on its own device.

    weight float32, bfloat16 or float16, of any shape; the last block may be short. In int8 a block
    is a row of a matrix, or of each in a stack, and the magnitudes stay in float32. UserError for a
    kind or block that is not known, for a weight of another dtype, and for one with values that are
    not finite. Largest error of a value in NF4: 0.152 absmax.
    """
    check_kind(kind)
    if block not in BLOCKS:
        raise UserError(f"a quantized block has {', '.join(map(str, BLOCKS))} values, not {block}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"a weight of {weight.dtype} is not quantized; give it in 32 or 16 bits")
    if kind == INT8:
        return _rows(weight.detach())
    flat = weight.detach().reshape(-1)
    codes = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // block), device=flat.device)
    for start in range(0, len(flat), PIECE):
        piece, most = _scaled(flat[start : start + PIECE].float(), block)
        _check_finite(most)
        absmax[start // block :][: len(most)] = most
        if len(piece) % 2:
            # the half of the last byte that is left over holds the code of zero
            piece = torch.cat([piece, piece.new_zeros(1)])
        found = _nearest(piece, kind)
        codes[start // 2 :][: len(found) // 2] = found[::2] << 4 | found[1::2]
    if not double:
        return Packed(codes, absmax, kind, block, tuple(weight.shape))
    offset = absmax.mean()
    eight, nested = _eight_bits(absmax - offset)
    return Packed(codes, eight, kind, block, tuple(weight.shape), nested, float(offset))


def dequantize(
    packed: Packed, out: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the numbers that `packed` stands for, in its shape: each rounded once to the dtype.

    out: a contiguous tensor of as many values to write into (its dtype then counts); nothing else
    of the weight's size is allocated. Computed by `FAST` of the device where it knows how.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    assert out.is_contiguous()
    assert out.numel() == math.prod(packed.shape)
    flat = out.view(-1)
    fast = FAST.get(out.device.type)
    if fast is None or not fast(packed, flat):
        _plainly(packed, flat)
    return out.view(packed.shape)


def scales(packed: Packed, part: slice = slice(None)) -> Tensor:
    """Return the absmax [blocks] of a part in float32, dequantized where they are quantized."""
    if packed.nested is None:
        return packed.absmax[part]
    absmax = packed.absmax
    within = torch.arange(*part.indices(len(absmax)), device=absmax.device) // NESTED
    return dynamic_map(absmax.device)[absmax[part].int()] * packed.nested[within] + packed.offset


def divides(packed: Packed) -> bool:
    """Return whether each of a stack [E, ...] has blocks of its own."""
    return math.prod(packed.shape[1:]) % max(packed.block, 2) == 0


def one(packed: Packed, i: int) -> Packed:
    """Return the i-th [...] of a stack [E, ...] that `divides`; its codes are not copied."""
    shape = packed.shape[1:]
    n = math.prod(shape)
    many, size = n // packed.block, n if packed.kind == INT8 else n // 2
    blocks, codes = slice(i * many, (i + 1) * many), packed.codes[i * size : (i + 1) * size]
    if packed.nested is None or many % NESTED:  # of a nested block it would have a part
        return Packed(codes, scales(packed, blocks), packed.kind, packed.block, shape)
    nested = packed.nested[i * many // NESTED : (i + 1) * many // NESTED]
    absmax = packed.absmax[blocks]
    return dataclasses.replace(packed, codes=codes, absmax=absmax, nested=nested, shape=shape)


def table(kind: str, device: torch.device | None = None) -> Tensor:
    """Return the 16 values [16] of the codes."""
    return _table(kind, device or torch.device("cpu"))


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values [256] of 8-bit codes, in rising order (Dettmers, arXiv:1511.04561).

    A sign, an exponent of ten written as a run of zeros, and the fraction in what bits remain.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), device=device)


def _plainly(packed: Packed, out: Tensor) -> None:
    """Fill `out` [n] by plain torch, a piece at a time."""
    if packed.kind == INT8:
        rows, width = len(packed.absmax), packed.block
        steps, codes = packed.absmax / 127, packed.codes.view(torch.int8).view(rows, width)
        many = max(1, PIECE // width)
        for i in range(0, rows, many):
            part = codes[i : i + many].float().mul_(steps[i : i + many, None])
            out.view(rows, width)[i : i + many] = part
        return
    values, absmax = table(packed.kind, out.device), scales(packed)
    for start in range(0, len(out), PIECE):
        piece = out[start : start + PIECE]
        codes = packed.codes[start // 2 :][: (len(piece) + 1) // 2]
        numbers = values[torch.stack((codes >> 4, codes & 15), -1).int()].view(-1)[: len(piece)]
        most = absmax[start // packed.block :][: -(-len(piece) // packed.block)]
        whole = len(piece) // packed.block * packed.block
        numbers[:whole].view(-1, packed.block).mul_(most[: whole // packed.block, None])
        numbers[whole:].mul_(most[-1:])
        piece.copy_(numbers)


def _compiled(packed: Packed, out: Tensor) -> bool:
    if packed.kind == INT8 or out.dtype not in compiled.KINDS or not compiled.available():
        return False
    nested = None
    if packed.nested is not None:
        nested = (dynamic_map(out.device), packed.nested, NESTED, packed.offset)
    values = table(packed.kind)
    compiled.dequantize(packed.codes, packed.absmax, values, out, block=packed.block, nested=nested)
    return True


def _by_triton(packed: Packed, out: Tensor) -> bool:
    from inlay.kernels import gpu  # which needs what is here

    return gpu.dequantize(packed, out)


FAST: dict[str, Callable[[Packed, Tensor], bool]] = {"cpu": _compiled, "cuda": _by_triton}
"""Device type -> what fills `out` [n] there, or returns False for what it does not know."""


def _rows(weight: Tensor) -> Packed:
    """Return matrices [..., O, I] in int8: each row over its absmax, times 127, rounded."""
    if weight.ndim < 2:
        raise UserError(f"int8 takes matrices, not a weight of {list(weight.shape)}")
    shape, weight = tuple(weight.shape), weight.reshape(-1, weight.shape[-1])
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(rows, device=weight.device)
    many = max(1, PIECE // width)
    for i in range(0, rows, many):
        part = weight[i : i + many].to(torch.float32, copy=True)
        most = part.abs().amax(1)
        _check_finite(most)
        absmax[i : i + many] = most
        scaled = part.mul_((127.0 / most.clamp(min=1e-36))[:, None])  # over less it is not finite
        codes[i : i + many] = scaled.round_().clamp_(-127, 127)
    return Packed(codes.view(torch.uint8).view(-1), absmax, INT8, width, shape)


def _check_finite(most: Tensor) -> None:
    if not most.isfinite().all():
        raise UserError("a weight with values that are NaN or infinite is not quantized")


def _scaled(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return values [n] over the absmax of their block, and these [blocks]; the last may be short.

    bitsandbytes multiplies by the reciprocal in whole blocks, and divides in a short one.
    """
    whole = len(values) // block * block
    blocks = values[:whole].view(-1, block)
    most = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / most.clamp(min=1e-38))[:, None]).view(-1)
    if whole < len(values):
        last = values[whole:].abs().amax().clamp(min=1e-38)
        most = torch.cat([most, last[None]])
        scaled = torch.cat([scaled, values[whole:] / last])
    return scaled.clamp_(-1, 1), most


def _eight_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit codes [n] of float32 values [n], and the absmax of each 256 of them.

    As bitsandbytes does it on the CPU: a quotient is first rounded to one of 65,536 steps.
    """
    blocks = -(-len(values) // NESTED)
    padded = torch.nn.functional.pad(values, (0, blocks * NESTED - len(values)))
    padded = padded.view(blocks, NESTED)
    most = padded.abs().amax(-1)
    scaled = (padded * (1.0 / most)[:, None]).nan_to_num_(0.0).clamp_(-1, 1)
    steps = ((scaled + 1) * 0.5 * (STEPS - 1) + 0.5).int()
    # a block of nothing but zeros has code 0, whose level times 0 is 0
    found = _steps(values.device)[steps].where(most[:, None] > 0, 0)
    return found.view(-1)[: len(values)].clone(), most


@cache
def _steps(device: torch.device) -> Tensor:
    """Return the 8-bit code [65536] of each step from -1 to 1."""
    levels = dynamic_map(device)
    values = -1 + 2.0 * torch.arange(STEPS, device=device) / (STEPS - 1)
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(TABLES[kind], device=device)


def _nearest(values: Tensor, kind: str) -> Tensor:
    """Return the code [n] uint8 of the table's value nearest to each in [-1, 1]; ties go down.

    As `torch.bucketize` finds it among the 15 middles between neighbors, in a fifth of its time:
    each of 1024 cells has one of them at most, so its place in the cell decides.
    """
    below, middle, order = _cells(kind, values.device)
    cell = _cell(values)
    found = below.index_select(0, cell)
    found.add_(values > middle.index_select(0, cell))
    return found if order is None else order.index_select(0, found.int())


def _cell(values: Tensor) -> Tensor:
    return ((values + 1) * (CELLS // 2)).int()


@cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return how many middles lie in cells before each [1025], and the next one after those [1025].

    And the codes by their values, where they are not in rising order.
    """
    values = table(kind, device)
    order = values.argsort()
    rising = values[order]
    middles = (rising[:-1] + rising[1:]) / 2
    below = torch.bucketize(torch.arange(CELLS + 1, device=device), _cell(middles).long())
    ends = torch.cat([middles, middles.new_full((1,), 2.0)])
    return below.to(torch.uint8), ends[below], None if kind == "nf4" else order.to(torch.uint8)
