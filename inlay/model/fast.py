"""All fast paths of a model, put on it together for a while and taken off together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from inlay.core.inlaid import Inlaid
from inlay.model.accelerate import accelerated
from inlay.model.attention import packed_attention
from inlay.model.blocks import Form, fast_blocks
from inlay.model.rotation import rotating_attention


@contextmanager
def fast_paths(model: nn.Module, run: Callable[[], Any]) -> Iterator[tuple[list[nn.Module], bool]]:
    """Let `model` compute by fast paths for a `with` block; the results are those of the plain.

    run: makes one forward pass of the model, which shows what each part is fed; here it is called
    without gradient and dropout. Yields the norms, gated MLPs and attention blocks that compute in
    a form of their own, and whether attention takes rows as they are.
    """

    def quietly() -> None:
        with torch.no_grad(), inference(model):
            run()

    with ExitStack() as stack:
        stack.enter_context(accelerated(model, quietly))
        blocks = stack.enter_context(fast_blocks(model, quietly))
        packed = stack.enter_context(packed_attention(model))
        if packed:
            blocks = blocks + stack.enter_context(rotating_attention(model, quietly))
        yield blocks, packed


def is_fast(model: nn.Module) -> bool:
    """Return whether any part of `model` computes by a fast path."""
    return any(
        isinstance(vars(module).get("forward"), Form)
        or (isinstance(module, Inlaid) and module.fast is not None)
        for module in model.modules()
    )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for the length of a `with` block; each module's own mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
