"""The most memory that a stretch of a run takes, over what was taken when it began."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import torch

from inlay.train.events import memory_mb

EVERY = 0.01
"""Seconds between two looks at what the process holds."""


class Peak:
    """Between `start` and `stop`: a GPU's own peak of tensors, else the process's, sampled."""

    def __init__(self, device: torch.device) -> None:
        """Look at nothing yet."""
        self.device = device
        self.before = self.most = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; what earlier runs have freed is given back first, so that it does not count."""
        self.stop()
        gc.collect()
        _give_back()
        if self.device.type == "cuda":
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.before = memory_mb(self.device)
        self.most = self.before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End and return the MiB that were taken at most, over those at the start."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
        return round(max(0.0, self.most - self.before), 1)

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            self.most = max(self.most, memory_mb(self.device))
            if self.device.type == "cuda":  # the allocator keeps its peak by itself
                self._done.wait()
        self.most = max(self.most, memory_mb(self.device))


def _give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library: Any = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim(0)
