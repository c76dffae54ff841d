"""The same LoRAs in PEFT's model and in ours, and the updates that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from tests.methods.bases import build

peft = pytest.importorskip("peft")

NAMES = ["default", "second", "third"]
"""What the adapters of `both` are called, in their order."""


def both(make: Any, folder: Path, *settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return PEFT's model and ours with the same random LoRAs, one for each of `settings`."""
    theirs = peft.get_peft_model(build(make), peft.LoraConfig(**settings[0]))
    for name, given in zip(NAMES[1:], settings[1:], strict=False):
        theirs.add_adapter(name, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    theirs.save_pretrained(folder)
    ours = inlay.PeftModel.from_pretrained(build(make), folder)
    for name in NAMES[1 : len(settings)]:
        ours.load_adapter(folder / name, name)
    return theirs.eval(), ours


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Return by path the update [O, I] of each of a LoRA's layers in our model."""
    return {path: a.delta(torch.float32) for path, _, a in model.roster.adapters(name)}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Compare two sets of updates, path by path."""
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=1e-5, msg=path)
