"""What checkpointed layers are fed, in the host's memory between the forward and backward pass.

Of a checkpointed layer its input alone is kept until the backward pass. Here a copy of it on the
host is, and the one on the device goes; while a layer is computed again, the input of the layer
before it is on its way back. Copies run beside the computation, on a stream of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from inlay.core.errors import UserError

LEAST = 1 << 20
"""Bytes below which a tensor stays: copying it takes longer than its room is worth."""
FUNCTION = "_gradient_checkpointing_func"
"""Where a module of transformers has torch's checkpoint, since it was switched on."""


class Copies(Protocol):
    """How tensors get to the host and back."""

    def send(self, tensor: Tensor) -> Any:
        """Begin to copy `tensor` to the host; return what `fetch` takes."""

    def fetch(self, sent: Any) -> Any:
        """Begin to copy it back; return what `arrive` takes."""

    def arrive(self, coming: Any) -> Tensor:
        """Return the tensor on the device, for what is computed from now on."""


class Offload:
    """Copies what is saved to the host where that pays, and back as a backward pass asks for it."""

    def __init__(self, copies: Copies, least: int = LEAST) -> None:
        """Move floating-point tensors from `least` bytes on."""
        self.copies, self.least = copies, least
        self.last: Callable[[], _Away | None] = lambda: None

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """Return what is kept in place of `tensor`, which may be itself."""
        if not tensor.is_floating_point() or tensor.nbytes < self.least:
            return tensor
        away = _Away(self.copies.send(tensor), self.last)
        self.last = weakref.ref(away)  # it lives as long as the graph that keeps it
        return away

    def unpack(self, kept: Tensor | _Away) -> Tensor:
        """Return the tensor, having begun to bring back the one that was sent before it."""
        if isinstance(kept, Tensor):
            return kept
        self._bring(kept)
        before = kept.before()
        if before is not None:
            self._bring(before)
        coming, kept.coming = kept.coming, None  # asked for again, it is brought again
        return self.copies.arrive(coming)

    def _bring(self, away: _Away) -> None:
        if away.coming is None:
            away.coming = self.copies.fetch(away.sent)


class _Away:
    """A tensor on the host, and the one that was sent before it."""

    def __init__(self, sent: Any, before: Callable[[], _Away | None]) -> None:
        self.sent, self.before = sent, before
        self.coming: Any = None


class Streamed:
    """Copies between a CUDA device and pinned memory of the host, on a stream beside the current.

    Written without a GPU at hand.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self.stream = torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> tuple[Tensor, torch.device]:
        """Copy once all is computed that the current stream has been told so far."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its room is not given away before it is copied
        return host, tensor.device

    def fetch(self, sent: tuple[Tensor, torch.device]) -> tuple[Tensor, torch.cuda.Event]:
        """Copy behind what was sent on the same stream, so that it is there."""
        host, device = sent
        with torch.cuda.stream(self.stream):
            tensor = host.to(device, non_blocking=True)
            return tensor, self.stream.record_event()

    def arrive(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """Let the current stream wait for this copy alone."""
        tensor, copied = coming
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(copied)
        tensor.record_stream(current)
        return tensor


def require_offload(device: torch.device) -> None:
    """Raise UserError where a model on `device` has nothing to move to the host."""
    if device.type != "cuda":
        raise UserError(
            f"train.offload_activations: the model is on {device.type!r}, and what is kept goes "
            "from a CUDA device to the host; set offload_activations: false"
        )


@contextmanager
def offloaded(model: nn.Module, offload: Offload) -> Iterator[None]:
    """Let `offload` keep what the layers of `model`, which checkpoints already, are fed.

    Raises UserError where no module of it checkpoints as those of transformers do.
    """
    found = [m for m in model.modules() if callable(vars(m).get(FUNCTION))]
    before = {module: getattr(module, FUNCTION) for module in found}
    if not before:
        raise UserError(
            f"train.offload_activations: {type(model).__name__} checkpoints in a way of its own; "
            "set offload_activations: false"
        )
    for module, checkpoint in before.items():
        setattr(module, FUNCTION, _within(offload, checkpoint))
    try:
        yield
    finally:
        for module, checkpoint in before.items():
            setattr(module, FUNCTION, checkpoint)


def _within(offload: Offload, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return `checkpoint`, whose own hooks take what is saved within; these see what it is fed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(offload.pack, offload.unpack):
            return checkpoint(*args, **kwargs)

    return call
