"""Packed weights on a GPU, in Triton: as numbers, and multiplied with few rows without these.

    dequantize  w[e] = table[code[e]] * scale[e / block], each rounded once to the dtype of w
    linear      y = x W^T + b        x [N, I], W [O, I], b [O], N at most ROWS
    product     dx = dy W            dy [N, O]

A scale is the block's absmax, or doubly quantized levels[byte] * nested[block / 256] + offset; in
int8 absmax / 127 of the row.  The products round each number as `dequantize` does and add up in
float32, so that they are those with the dequantized weight but for the order of their sums.  Codes
are read once; W is never in memory.  On the CPU it runs where `TRITON_INTERPRET=1` was set before
Triton was imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.codec import INT8, NESTED, Packed, dynamic_map, table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What numbers and products come out in."""
ROWS = 16
"""Rows that a product takes: one tile of a tensor core, so that no code is unpacked twice."""
WIDTH = 64
"""Columns of a tile; it stays within a block, of which one scale is read a row."""
HEIGHT = 32
"""Rows of W in a tile."""
PIECE = 4096
"""Values that one program makes into numbers."""
APART = {"enable_fp_fusion": False}
"""No product is fused with the sum after it: each is rounded, as the eager twin rounds it."""
_ROWS, _NESTED = tl.constexpr(ROWS), tl.constexpr(NESTED)


def dequantize(packed: Packed, out: Tensor) -> None:
    """Fill `out` [n], contiguous, with the numbers."""
    n, blocks = out.numel(), max(1, PIECE // packed.block)
    with torch.cuda.device_of(out):
        if packed.kind == INT8:
            rows, width = len(packed.absmax), packed.block
            codes = packed.codes.view(torch.int8)
            grid = (rows, triton.cdiv(width, PIECE))
            _numbers_of_rows[grid](codes, packed.absmax, out, width, PIECE=PIECE)
            return
        _numbers[(triton.cdiv(n, blocks * packed.block),)](
            *(*_weight(packed), out, n, len(packed.codes)),
            **(_kind(packed) | {"BLOCKS": blocks}),
            **APART,
        )


def knows(packed: Packed, rows: int) -> bool:
    """Return whether the products take this weight and so many rows."""
    whole = packed.kind == INT8 or packed.shape[1] % min(WIDTH, packed.block) == 0
    return len(packed.shape) == 2 and whole and 0 < rows <= ROWS


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [N, O] in the dtype of x, for what it `knows`."""
    outputs, inputs = packed.shape
    out = x.new_empty(len(x), outputs)
    with torch.cuda.device_of(out):
        _linear[(triton.cdiv(outputs, HEIGHT),)](
            *(x.contiguous(), *_weight(packed), bias, out, len(x), outputs, inputs),
            **(_kind(packed) | _tile_of(packed)),
            **APART,
        )
    return out


def product(grad: Tensor, packed: Packed) -> Tensor:
    """Return dy W [N, I] in the dtype of dy, for what it `knows`."""
    outputs, inputs = packed.shape
    out = grad.new_empty(len(grad), inputs)
    tile = _tile_of(packed)
    with torch.cuda.device_of(out):
        _product[(triton.cdiv(inputs, tile["WIDTH"]),)](
            *(grad.contiguous(), *_weight(packed), out, len(grad), outputs, inputs),
            **(_kind(packed) | tile),
            **APART,
        )
    return out


def _weight(packed: Packed) -> tuple[Tensor | float | None, ...]:
    """Return the codes, absmax, nested, levels, table and offset, as the kernels take them."""
    where = packed.codes.device
    if packed.kind == INT8:
        return packed.codes.view(torch.int8), packed.absmax, None, None, None, 0.0
    levels = None if packed.nested is None else dynamic_map(where)
    values = table(packed.kind, where)
    return packed.codes, packed.absmax, packed.nested, levels, values, packed.offset


def _kind(packed: Packed) -> dict[str, int | bool]:
    # int8 has no use for the block, and a kernel would be compiled for each width of a row
    block = 1 if packed.kind == INT8 else packed.block
    return {"BLOCK": block, "DOUBLE": packed.nested is not None}


def _tile_of(packed: Packed) -> dict[str, int | bool]:
    eight = packed.kind == INT8
    width = WIDTH if eight else min(WIDTH, packed.block)
    return {"EIGHT": eight, "HEIGHT": HEIGHT, "WIDTH": width}


@triton.jit
def _scales(absmax, nested, levels, offset, at, real, DOUBLE: tl.constexpr):
    """Return the scales of the blocks `at`, where these are `real`."""
    if DOUBLE:
        byte = tl.load(absmax + at, mask=real, other=0).to(tl.int32)
        outer = tl.load(nested + at // _NESTED, mask=real, other=0.0)
        scales = tl.load(levels + byte) * outer + offset
    else:
        scales = tl.load(absmax + at, mask=real, other=0.0)
    return scales


@triton.jit
def _pairs(byte, scales, table):
    """Return the numbers of bytes [R, C], in float32: [R, 2 C]."""
    byte = byte.to(tl.int32)
    first = tl.load(table + (byte >> 4)) * scales[:, None]
    second = tl.load(table + (byte & 15)) * scales[:, None]
    return tl.interleave(first, second)


@triton.jit
def _numbers(
    codes, absmax, nested, levels, table, offset, out, n, size,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Write the numbers of BLOCKS blocks."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: a weight may have more than 2^31
    block, half = tl.arange(0, BLOCKS), tl.arange(0, BLOCK // 2)
    before, left = first * (BLOCK // 2), n - first * BLOCK
    at = block[:, None] * (BLOCK // 2) + half[None, :]
    byte = tl.load(codes + before + at, mask=at < size - before, other=0)
    scales = _scales(absmax, nested, levels, offset, first + block, block * BLOCK < left, DOUBLE)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numbers = _pairs(byte, scales, table).to(out.dtype.element_ty)
    tl.store(out + first * BLOCK + at, numbers, mask=at < left)


@triton.jit
def _numbers_of_rows(codes, absmax, out, width, PIECE: tl.constexpr):
    """Write PIECE numbers of a row in int8."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    code = tl.load(codes + row * width + at, mask=at < width, other=0).to(tl.float32)
    numbers = code * tl.div_rn(tl.load(absmax + row), 127.0)
    tl.store(out + row * width + at, numbers.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _tile(
    codes, absmax, nested, levels, table, offset, row, column, outputs, inputs,
    EIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Return WIDTH columns of W from `column` on, in float32, of the rows [R] that there are."""
    real = row < outputs
    first = row.to(tl.int64) * inputs + column
    if EIGHT:
        at = tl.arange(0, WIDTH)
        there = real[:, None] & (column + at < inputs)[None, :]
        code = tl.load(codes + first[:, None] + at[None, :], mask=there, other=0)
        steps = tl.div_rn(tl.load(absmax + row, mask=real, other=0.0), 127.0)
        numbers = code.to(tl.float32) * steps[:, None]
    else:
        # a tile is whole and within a block, which WIDTH and the number of columns see to
        at = tl.arange(0, WIDTH // 2)
        byte = tl.load(codes + (first // 2)[:, None] + at[None, :], mask=real[:, None], other=0)
        scales = _scales(absmax, nested, levels, offset, first // BLOCK, real, DOUBLE)
        numbers = _pairs(byte, scales, table)
    return numbers


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, codes, absmax, nested, levels, table, offset, bias, out, rows, outputs, inputs,
    EIGHT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Write HEIGHT columns of x W^T + b."""
    i, o = tl.arange(0, _ROWS), tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    total = tl.zeros((_ROWS, HEIGHT), tl.float32)
    for column in range(0, inputs, WIDTH):
        at = column + tl.arange(0, WIDTH)
        there = (i < rows)[:, None] & (at < inputs)[None, :]
        given = tl.load(x + i[:, None] * inputs + at[None, :], mask=there, other=0.0)
        w = _tile(
            codes, absmax, nested, levels, table, offset, o, column, outputs, inputs,
            EIGHT, WIDTH, BLOCK, DOUBLE,
        ).to(given.dtype)  # fmt: skip
        total += tl.dot(given, tl.trans(w), input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    there = (i < rows)[:, None] & (o < outputs)[None, :]
    at = i.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _product(
    grad, codes, absmax, nested, levels, table, offset, out, rows, outputs, inputs,
    EIGHT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Write WIDTH columns of dy W."""
    i, column = tl.arange(0, _ROWS), tl.program_id(0) * WIDTH
    total = tl.zeros((_ROWS, WIDTH), tl.float32)
    for row in range(0, outputs, HEIGHT):
        o = row + tl.arange(0, HEIGHT)
        there = (i < rows)[:, None] & (o < outputs)[None, :]
        given = tl.load(grad + i[:, None] * outputs + o[None, :], mask=there, other=0.0)
        w = _tile(
            codes, absmax, nested, levels, table, offset, o, column, outputs, inputs,
            EIGHT, WIDTH, BLOCK, DOUBLE,
        ).to(given.dtype)  # fmt: skip
        total += tl.dot(given, w, input_precision="ieee")
    at = column + tl.arange(0, WIDTH)
    there = (i < rows)[:, None] & (at < inputs)[None, :]
    at = i.to(tl.int64)[:, None] * inputs + at[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
