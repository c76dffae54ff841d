"""Starts that are computed from the base, set into a LoRA."""

from __future__ import annotations

import torch

from inlay import inits
from inlay.core.adapter import Adapter
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.methods.lora import Lora


@torch.no_grad()
def begin(adapter: Adapter, base: Base, *, fill: bool) -> None:
    """Give a LoRA the start that its configuration names, where that is one of `inlay.inits`.

    fill: set its factors; without, only what the start takes off the base, for a file that has the
    factors. The base itself stays: the adapter subtracts its start, so that the other adapters, and
    the model with none, still see the whole weight.
    """
    if not isinstance(adapter, Lora) or not isinstance(init := adapter.config.start, str):
        return
    if base.kind == "embedding":
        return  # as in PEFT: the plain start
    if base.kind != "linear":
        raise UserError(
            f"init_lora_weights={init!r} starts from a matrix, and a {base.kind} takes the plain "
            "start: leave it out of target_modules, or use true"
        )
    b, a, from_the_base = inits.start(init, base.weight(), adapter.config.r, adapter.config.scaling)
    if fill:
        adapter.lora_B.copy_(b)
        adapter.lora_A.copy_(a)
    if from_the_base:
        kind = adapter.lora_A.dtype
        adapter.start_B = b.to(kind).contiguous()
        adapter.start_A = a.to(kind).contiguous()
