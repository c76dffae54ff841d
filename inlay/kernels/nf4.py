"""4-bit codes -> numbers on the CPU, by `nf4.c`: some ten times as fast as the eager twin."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.native import library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def _function() -> Any:
    found = library("nf4")
    if found is None:
        return None
    function = found.inlay_dequantize_4bit
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer] * 7 + [whole] * 3 + [ctypes.c_float] + [ctypes.c_int] * 2
    function.restype = None
    return function


def available() -> bool:
    """Return whether this machine can compile it."""
    return _function() is not None


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    block: int,
    nested: tuple[Tensor, Tensor, int, float] | None = None,
) -> Tensor:
    """Fill `out` [n] with table[code] * absmax of its block and return it.

    codes [n / 2] bytes, the first code in the high half; table [16]; absmax [n / block] floats, or
    with `nested` (map [256], absmax of the absmax, their block, offset) bytes: map[byte] * absmax +
    offset. All contiguous and on the CPU. RuntimeError where it is not available.
    """
    function = _function()
    if function is None:
        raise RuntimeError("no compiler made nf4.c; the eager twin computes the same")
    for tensor in (codes, absmax, table, out, *(nested or ())[:2]):
        assert isinstance(tensor, Tensor)
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
    n = out.numel()
    assert codes.numel() * 2 >= n
    assert absmax.numel() == -(-n // block)
    assert absmax.dtype == (torch.uint8 if nested else torch.float32)
    map_, outer, outer_block, offset = nested or (None, None, 1, 0.0)
    function(
        codes.data_ptr(),
        absmax.data_ptr() if nested else None,
        None if nested else absmax.data_ptr(),
        None if map_ is None else map_.data_ptr(),
        None if outer is None else outer.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        n,
        block,
        outer_block,
        offset,
        KINDS[out.dtype],
        torch.get_num_threads(),
    )
    return out
