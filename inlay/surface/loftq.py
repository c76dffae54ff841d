"""LoftQ on a base that was quantized elsewhere: a LoRA that makes up for what it lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.inits.loftq import making_up
from inlay.methods.lora import Lora
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
    the folder that the base was loaded from). callback:
    called with the model and a module's path after each; where it returns false, that module's
    factors are put back.
    """
    roster = roster_of(peft_model)
    roster.check(adapter_name)
    model_path = model_path or getattr(roster.model, "name_or_path", None)
    if not model_path or not os.path.exists(model_path):
        raise UserError(f"model_path={model_path!r} is no folder or file with the base's weights")
    weights = _Weights(Path(model_path), getattr(roster.model, "base_model_prefix", ""))
    for path, host, adapter in roster.adapters(adapter_name):
        if not isinstance(adapter, Lora) or host.base.kind != "linear":
            continue
        now = host.base.weight().float()
        whole = weights.read(f"{path}.weight").to(now)
        if whole.shape != now.shape:
            whole = whole.T
        if whole.shape != now.shape:
            raise UserError(f"{model_path}: {path}.weight has not the shape {list(now.shape)}")
        before = adapter.lora_B.clone(), adapter.lora_A.clone()
        b, a = making_up(whole - now, adapter.config.r, adapter.config.scaling)
        adapter.lora_B.copy_(b)
        adapter.lora_A.copy_(a)
        if callback is not None and not callback(peft_model, path):
            adapter.lora_B.copy_(before[0])
            adapter.lora_A.copy_(before[1])


class _Weights:
    """Tensors of one or more safetensors files by name."""

    def __init__(self, place: Path, prefix: str) -> None:
        from safetensors import safe_open

        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise UserError(f"{place}: there are no safetensors files")
        self._files: dict[str, Path] = {}
        self._place, self._prefix = place, f"{prefix}."
        for file in files:
            with safe_open(file, framework="pt") as held:
                self._files |= dict.fromkeys(held.keys(), file)

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        # a base model's own files leave out the prefix that its heads' models have
        found = next((n for n in (name, name.removeprefix(self._prefix)) if n in self._files), None)
        if found is None:
            raise UserError(f"{self._place} holds no {name}: give the folder of this base")
        with safe_open(self._files[found], framework="pt") as held:
            tensor: Tensor = held.get_tensor(found)
            return tensor
