"""Triton's kernels on a GPU, where that is installed and a first try came out right.

Packed weights are here. What Triton does not do with them, each function leaves to plain torch:
`dequantize` answers False, the products None.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import codec
from inlay.kernels.codec import Packed

LEAST = {torch.bfloat16: (8, 0), torch.float16: (7, 5), torch.float32: (7, 5)}
"""The oldest compute capability that Triton is asked for on, by what it computes in."""
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""How far a result may be from the eager one, of its largest value."""


def dequantize(packed: Packed, out: Tensor) -> bool:
    """Fill `out` [n] with the numbers of `packed`, and return whether that was done."""
    kernels = triton_for(out.device, out.dtype)
    if kernels is not None:
        kernels.dequantize(packed, out)
    return kernels is not None


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor | None:
    """Return x W^T + b [N, O] of few rows x [N, I], W never in memory; or None."""
    kernels = triton_for(x.device, x.dtype)
    if kernels is None or not kernels.knows(packed, len(x)):
        return None
    return cast(Tensor, kernels.linear(x, packed, bias))


def product(x: Tensor, packed: Packed) -> Tensor | None:
    """Return x W [N, I] of few rows x [N, O], W never in memory; or None."""
    kernels = triton_for(x.device, x.dtype)
    if kernels is None or not kernels.knows(packed, len(x)):
        return None
    return cast(Tensor, kernels.product(x, packed))


@cache
def triton_for(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the kernels of packed layers in `dtype` on this device, or None as `tried` does."""
    return tried("nf4_triton", "packed layers are", wrong, device, dtype)


def tried(
    name: str,
    what: str,
    wrong: Callable[[Any, torch.device, torch.dtype], str | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Return the module `name` of Triton's kernels, or None where plain torch is to compute.

    wrong: returns what its kernels compute otherwise than plain torch does, or None.
    None: for another kind of device or number, for a card that is too old, without Triton, where
    `INLAY_NATIVE` is 0, and where the first try fails, which is told in a warning.
    """
    if device.type != "cuda" or dtype not in LEAST or torch.version.hip is not None:
        return None
    if os.environ.get("INLAY_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < LEAST[dtype]:
        return None
    try:
        kernels = importlib.import_module(f"inlay.kernels.{name}")
        # in a thread of its own, where the caller's modes (inference, autocast, the hooks by which
        # checkpointing counts what is saved) do not reach
        with ThreadPoolExecutor(1) as apart:
            failed = apart.submit(wrong, kernels, device, dtype).result()
    except Exception as error:  # no compiler, no headers of Python, a driver that is too old, ...
        failed = f"{type(error).__name__}: {error}".splitlines()[0]
    if failed is None:
        return kernels
    warnings.warn(
        f"{what} computed by plain torch on {device}, slower: Triton's kernels failed on a first "
        f"try in {dtype} ({failed})",
        stacklevel=4,
    )
    return None


def close(found: Tensor, wanted: Tensor) -> bool:
    """Return whether `found` is `wanted` on the CPU, but for its own rounding."""
    apart = (found.detach().cpu().float() - wanted.detach()).abs().max()
    return bool(apart <= CLOSE[found.dtype] * wanted.detach().abs().max())


def wrong(kernels: ModuleType | Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what `kernels` compute otherwise than plain torch does on the CPU, or None."""
    generator = torch.Generator().manual_seed(0)
    weight, x, grad, bias = (
        torch.randn(shape, generator=generator) for shape in ((80, 128), (3, 128), (3, 80), (80,))
    )
    narrow = [t.to(dtype).float() for t in (x, grad, bias)]
    for kind in codec.KINDS:
        packed = codec.quantize(weight, kind)
        meant = codec.dequantize(packed, dtype=dtype)
        there = _moved(packed, device)
        out = torch.empty(meant.shape, dtype=dtype, device=device)
        kernels.dequantize(there, out.view(-1))
        if not torch.equal(out.cpu(), meant):
            return f"other numbers from {kind}"
        given = [t.to(device, dtype) for t in (x, grad, bias)]
        through = F.linear(narrow[0], meant.float(), narrow[2])
        back = narrow[1] @ meant.float()
        for name, found, wanted in (
            ("x W^T", kernels.linear(given[0], there, given[2]), through),
            ("dy W", kernels.product(given[1], there), back),
        ):
            if not close(found, wanted):
                return f"another {name} from {kind}"
    return None


def _moved(packed: Packed, device: torch.device) -> Packed:
    nested = None if packed.nested is None else packed.nested.to(device)
    codes, absmax = packed.codes.to(device), packed.absmax.to(device)
    return dataclasses.replace(packed, codes=codes, absmax=absmax, nested=nested)
