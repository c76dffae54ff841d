"""Products with a frozen weight in codes: x W^T + b and x W, of W [O, I], b [O] and N rows x.

In bfloat16, on a CPU that has instructions for it (AVX512-BF16), `products.c` makes the weight a
panel at a time, in the cache, and multiplies it there: of the same numbers, added up in float32.
So does Triton on a GPU, for few rows (`gpu.py`). Elsewhere the weight is dequantized whole, on the
CPU into a buffer that all layers share.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.kernels import codec, gpu, matmul
from inlay.kernels.codec import Packed
from inlay.kernels.native import library
from inlay.kernels.scratch import SCRATCH


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [N, O] of x [N, I], in the dtype of both; no gradient is noted."""
    if known(x, packed):
        return _multiply(x, packed, bias, transposed=False)
    few = gpu.linear(x, packed, bias)
    if few is not None:
        return few
    return matmul.linear(x, numbers(packed, x.dtype), bias)


def product(x: Tensor, packed: Packed) -> Tensor:
    """Return x W [N, I] of x [N, O], in the dtype of x; no gradient is noted."""
    if known(x, packed):
        return _multiply(x, packed, None, transposed=True)
    few = gpu.product(x, packed)
    if few is not None:
        return few
    return matmul.product(x, numbers(packed, x.dtype))


def numbers(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight in its shape; on the CPU in this thread's buffer, until the next call."""
    if packed.codes.device.type != "cpu":
        # an accelerator's allocator keeps freed memory, and knows which stream is done with it
        return codec.dequantize(packed, dtype=dtype)
    return codec.dequantize(packed, SCRATCH.take(dtype, math.prod(packed.shape)))


def known(x: Tensor, packed: Packed) -> bool:
    """Return whether `products.c` multiplies such an x and weight on this machine."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or packed.kind == codec.INT8:
        return False
    return packed.shape[1] % packed.block == 0 and available()


def available() -> bool:
    """Return whether `products.c` was compiled, and for a CPU whose instructions it takes."""
    return _functions() is not None


@cache
def _functions() -> Any:
    found = library("products")
    if found is None:
        return None
    whole, pointer, small = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    found.inlay_product_room.argtypes = [whole, whole, small]
    found.inlay_product_room.restype = whole
    weight = [pointer] * 6 + [whole] * 2 + [small] * 2 + [ctypes.c_float]
    found.inlay_product.argtypes = weight + [pointer] * 3 + [whole, small, pointer, small]
    found.inlay_product.restype = None
    return found


def _multiply(x: Tensor, packed: Packed, bias: Tensor | None, *, transposed: bool) -> Tensor:
    functions, threads = _functions(), torch.get_num_threads()
    outputs, inputs = packed.shape
    x = x.contiguous()
    rows, width = x.shape
    assert width == (outputs if transposed else inputs)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    out = x.new_empty(rows, inputs if transposed else outputs)
    values = codec.table(packed.kind)
    room = SCRATCH.take(torch.uint8, functions.inlay_product_room(rows, width, threads))
    double = packed.nested is not None
    functions.inlay_product(
        packed.codes.data_ptr(),
        packed.absmax.data_ptr() if double else None,
        None if double else packed.absmax.data_ptr(),
        codec.dynamic_map(x.device).data_ptr(),
        None if packed.nested is None else packed.nested.data_ptr(),
        values.data_ptr(),
        outputs,
        inputs,
        _bits(packed.block),
        _bits(codec.NESTED),
        packed.offset,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        transposed,
        room.data_ptr(),
        threads,
    )
    return out


def _bits(power: int) -> int:
    """Return the b of 2^b."""
    return power.bit_length() - 1
