"""The files of every architecture: PEFT's load here and ours load there, with the same logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.model import targets
from tests.model.conftest import ARCHITECTURES, output

FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("how", ["usual", "named"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(architecture: Any, name: str, how: str, tmp_path: Path) -> None:
    import peft

    # PEFT has no usual targets for some of these: they are named for it
    usual = targets.targets(architecture(name), inlay.LoraConfig())
    named = usual if how == "usual" else ARCHITECTURES[name][3]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": named, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what transformers is about to drop
        theirs = peft.get_peft_model(architecture(name), peft.LoraConfig(**settings)).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        expected = output(theirs, name)
    ours = inlay.PeftModel.from_pretrained(architecture(name), tmp_path / "theirs")
    torch.testing.assert_close(output(ours, name), expected, rtol=0, atol=1e-6)

    ours.save_pretrained(tmp_path / "ours")
    before, after = load_file(tmp_path / "theirs" / FILE), load_file(tmp_path / "ours" / FILE)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(architecture(name), tmp_path / "ours").eval()
        torch.testing.assert_close(output(back, name), expected, rtol=0, atol=1e-6)
