"""LoftQ on a base that was quantized elsewhere: a LoRA that makes up for what it lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from inlay.inits.loftq import making_up
from inlay.methods.lora import Lora
from inlay.model.unpacked import Weights
from inlay.surface.functions import roster_of


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set a LoRA's factors to make up for what its base lost when it was quantized.

    model_path: the safetensors file, or the folder with them, of the base before that (default:
    what the base was loaded from, where it was packed as it was read). callback: called with the
    model and a module's path after each; where it returns false, that module's factors are put
    back.
    """
    roster = roster_of(peft_model)
    roster.check(adapter_name)
    weights = Weights(model_path, roster.model)
    for path, host, adapter in roster.adapters(adapter_name):
        if not isinstance(adapter, Lora) or host.base.kind != "linear":
            continue
        now = host.base.weight().float()
        whole = weights.read(f"{path}.weight", now)
        before = adapter.lora_B.clone(), adapter.lora_A.clone()
        b, a = making_up(whole - now, adapter.config.r, adapter.config.scaling)
        adapter.lora_B.copy_(b)
        adapter.lora_A.copy_(a)
        if callback is not None and not callback(peft_model, path):
            adapter.lora_B.copy_(before[0])
            adapter.lora_A.copy_(before[1])
