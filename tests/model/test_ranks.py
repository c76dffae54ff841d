"""AdaLoRA's budget of ranks beside PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import UserError
from inlay.model.ranks import Ranks
from inlay.model.roster import Roster
from tests.methods.bases import build, llama, output, randomize

SETTINGS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 1,
    "tinit": 1,
    "total_step": 9,
    "tfinal": 2,
    "deltaT": 2,
    "lora_alpha": 64,
    "orth_reg_weight": 0.0,
    "target_modules": ["q_proj", "down_proj"],
}


def ours() -> tuple[torch.nn.Module, Ranks]:
    model = build(llama)
    roster = Roster(model)
    roster.add("default", inlay.AdaLoraConfig(**SETTINGS))
    return model, Ranks(roster, "default")


@pytest.mark.filterwarnings("ignore")
def test_the_same_ranks_are_taken_away_at_the_same_steps():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build(llama), peft.AdaLoraConfig(**SETTINGS))
    randomize(theirs)
    model, ranks = ours()
    state = theirs.state_dict()
    for path, adapter in ranks.adapters.items():
        for part in ("lora_A", "lora_B", "lora_E"):
            key = f"base_model.model.{path}.{part}.default"
            adapter.get_parameter(part).data.copy_(state[key])
    ids = torch.arange(3, 23).reshape(2, 10)
    for step in range(1, 10):
        for side in (theirs, model):
            side(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                for p in side.parameters():
                    if p.requires_grad:
                        p.sub_(0.1 * p.grad)
        theirs.base_model.update_and_allocate(step)
        ranks.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        assert {k.removesuffix(".lora_E.default"): v for k, v in pattern.items()} == ranks.masks
        state = theirs.state_dict()
        for path, adapter in ranks.adapters.items():
            wanted = state[f"base_model.model.{path}.lora_E.default"]
            torch.testing.assert_close(adapter.lora_E.detach(), wanted, rtol=0, atol=1e-5)
        theirs.zero_grad()
        model.zero_grad()
    kept = [kept for mask in ranks.masks.values() for kept in mask]
    assert sum(kept) == SETTINGS["target_r"] * len(ranks.masks) < len(kept)


# PEFT warns that the patterns of its own AdaLoRA files match no module
@pytest.mark.filterwarnings("ignore")
def test_settled_ranks_compute_the_same_and_are_in_the_file(tmp_path):
    model = inlay.get_peft_model(build(llama), inlay.AdaLoraConfig(**SETTINGS))
    randomize(model)
    ranks = Ranks(model.roster, "default")
    ids = torch.arange(3, 23).reshape(2, 10)
    for step in range(1, 8):
        model(input_ids=ids, labels=ids).loss.backward()
        ranks.update_and_allocate(step)
        model.zero_grad()
    expected = output(model.eval())
    ranks.settle()
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-6)
    left = sum(sum(mask) for mask in ranks.masks.values())
    assert left == SETTINGS["target_r"] * len(ranks.masks)
    assert sum(len(a.lora_E) for a in ranks.adapters.values()) == left
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    torch.testing.assert_close(output(again), expected, rtol=0, atol=1e-6)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(build(llama), tmp_path).eval()
    torch.testing.assert_close(output(theirs), expected, rtol=0, atol=1e-5)


def test_a_schedule_needs_gradients_its_length_and_adalora():
    _, ranks = ours()
    with pytest.raises(UserError, match="after backward and before zero_grad"):
        ranks.update_and_allocate(1)
    roster = Roster(build(llama))
    roster.add("a", inlay.AdaLoraConfig(init_r=2, target_modules=["q_proj"]))
    roster.add("b", inlay.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="needs total_step"):
        Ranks(roster, "a")
    with pytest.raises(UserError, match="'b' is LORA"):
        Ranks(roster, "b")
