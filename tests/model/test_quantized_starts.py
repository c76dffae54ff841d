"""Starts and variants of a LoRA that are about quantizing, over a base that is packed really."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay import UserError
from inlay.methods.lora import LoraConfig
from tests.model.test_quantized_load import IDS, logits, packed, tiny


def test_factors_make_up_for_what_packing_lost(tmp_path: Path) -> None:
    plain, _ = inlay.load_base(tiny(tmp_path), device="cpu")
    base, _ = inlay.load_base(tmp_path, quantize="nf4", device="cpu")
    model = inlay.get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).eval()
    lost = (logits(model) - logits(plain)).square().mean()
    inlay.replace_lora_weights_loftq(model)
    assert (logits(model) - logits(plain)).square().mean() < 0.7 * lost


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_loftq_starts_from_what_packing_lost_and_keeps_no_second_weight(
    tmp_path: Path, kind: str, bits: int
) -> None:
    def base() -> Any:
        return inlay.load_base(tmp_path / "base", quantize=kind, device="cpu")[0]

    plain, _ = inlay.load_base(tiny(tmp_path / "base"), device="cpu")
    chosen: dict[str, Any] = {"r": 16, "target_modules": "all-linear"}
    start: dict[str, Any] = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits}}
    model = inlay.get_peft_model(base(), LoraConfig(**chosen, **start)).eval()
    other = inlay.get_peft_model(base(), LoraConfig(**chosen)).eval()
    packed_alone = (logits(other) - logits(plain)).square().mean()
    assert (logits(model) - logits(plain)).square().mean() < 0.7 * packed_alone
    inlay.replace_lora_weights_loftq(other)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-4)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held == sum(t.nbytes for t in (*other.parameters(), *other.buffers()))

    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    assert all(p.grad.abs().max() > 0 for p in trained if p.grad is not None)
    model.save_pretrained(tmp_path / "adapter")
    again = inlay.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)


def test_loftq_says_what_it_lacks_over_a_base_whose_weights_are_not_at_hand(
    tmp_path: Path,
) -> None:
    base, _ = inlay.load_base(tiny(tmp_path / "base"), quantize="nf4", device="cpu")
    base.save_pretrained(tmp_path / "packed")
    saved, _ = inlay.load_base(tmp_path / "packed", device="cpu")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="loftq")
    with pytest.raises(UserError, match=r"in codes.*16-bit folder.*replace_lora_weights_loftq"):
        inlay.get_peft_model(saved, settings)
    twice = settings.replace(loftq_config={"loftq_iter": 2})
    with pytest.raises(UserError, match=r"packed already, in 4 bits and once"):
        inlay.get_peft_model(base, twice)
    model = inlay.get_peft_model(saved, settings.replace(init_lora_weights=True))
    before = logits(model)
    inlay.replace_lora_weights_loftq(model, tmp_path / "base")
    assert not torch.equal(logits(model), before)


def test_qalora_trains_and_merges_over_a_packed_base(tmp_path: Path) -> None:
    base, _ = inlay.load_base(tiny(tmp_path), quantize="nf4", device="cpu")
    settings = LoraConfig(r=4, target_modules="all-linear", use_qalora=True, qalora_group_size=32)
    model = inlay.get_peft_model(base, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    ran = logits(model.eval())
    merged = model.merge_and_unload()
    assert not packed(merged)
    torch.testing.assert_close(logits(merged), ran, rtol=0, atol=1e-4)
