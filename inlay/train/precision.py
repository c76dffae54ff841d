"""The arithmetic of a pass: float32, or bfloat16 by autocast over weights that stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from inlay.train.settings import Precision


def choose(precision: Precision, model: nn.Module) -> torch.dtype:
    """Return torch.float32 or torch.bfloat16.

    "auto" is bfloat16 where `model` has bfloat16 weights (in float32 every product would be cast up
    first), or where its device has units for it (`units`); docs/decisions has what that gives.
    """
    if precision != "auto":
        return getattr(torch, precision)
    return torch.bfloat16 if _is_bfloat16(model) or units(device_of(model)) else torch.float32


def reason(precision: Precision, model: nn.Module) -> str:
    """Return why "auto" chose as it did; "" where it was not asked to."""
    if precision != "auto":
        return ""
    if _is_bfloat16(model):
        return "as the base's weights are"
    found = units(device_of(model))
    return f"for which there is {found}" if found else "for there are no units for bfloat16"


def units(device: torch.device) -> str:
    """Return what `device` multiplies bfloat16 by; "" where it has nothing for that."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else ""
    if device.type != "cpu":
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def _is_bfloat16(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the forward pass runs."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def device_of(model: nn.Module) -> torch.device:
    """Return where `model` takes its inputs: the device of its first parameter."""
    return next(model.parameters()).device
