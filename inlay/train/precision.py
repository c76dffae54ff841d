"""The arithmetic of a pass: float32, or bfloat16 by autocast over weights that stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn


def choose(precision: Literal["auto", "float32", "bfloat16"], model: nn.Module) -> torch.dtype:
    """Return torch.float32 or torch.bfloat16.

    "auto" is bfloat16 where `model` has bfloat16 weights (in float32 every product would be cast up
    first), or where its device has units for it: CUDA from compute 8.0, CPUs with AMX. AVX-512 BF16
    alone does not count: on one EPYC core autocast made a 768-wide model 1.7 times as fast, but a
    192-wide one, its batches of many widths, 10 to 20% slower. There it is the user's to ask for.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return torch.bfloat16
    device = device_of(model)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the forward pass runs."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def device_of(model: nn.Module) -> torch.device:
    """Return where `model` takes its inputs: the device of its first parameter."""
    return next(model.parameters()).device
