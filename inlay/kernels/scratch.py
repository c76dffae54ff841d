"""Memory that is written to again and again: what is new costs as much as filling it ten times."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """One buffer a thread and dtype on the CPU, as large as the most that was asked for there."""

    def __init__(self) -> None:
        """Begin with none."""
        self.buffers: dict[torch.dtype, Tensor] = {}

    def take(self, dtype: torch.dtype, n: int) -> Tensor:
        """Return room for n values, with whatever was in it."""
        buffer = self.buffers.get(dtype)
        if buffer is None or buffer.numel() < n:
            self.buffers.pop(dtype, None)  # before the larger one is made
            del buffer
            # a tensor made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                buffer = self.buffers[dtype] = torch.empty(n, dtype=dtype)
        return buffer[:n]


SCRATCH = Scratch()
"""Shared by kernels that need their room for the length of one call."""
