"""LoRA+ and LoRA-FA beside PEFT's, and in the training loop."""

from __future__ import annotations

import peft
import peft.optimizers.lorafa
import pytest
import torch
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

import inlay
from inlay.core.errors import UserError
from tests.methods.bases import build, llama, randomize

# PEFT asks models for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
IDS = torch.arange(3, 23).reshape(2, 10)
PARTS = ("lora_A", "lora_B")


def pair(settings=SETTINGS):
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(**settings))
    randomize(theirs)
    ours = inlay.get_peft_model(build(llama), inlay.LoraConfig(**settings))
    inlay.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def three_steps(model, optimizer, factor=1.0):
    for _ in range(3):
        (factor * model(input_ids=IDS, labels=IDS).loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(theirs, ours, before, tolerance):
    wanted, found = map(peft_tensors, (theirs, ours))
    assert wanted.keys() == found.keys()
    for key in wanted:
        change, theirs_change = found[key] - before[key], wanted[key] - before[key]
        torch.testing.assert_close(change, theirs_change, rtol=tolerance, atol=tolerance, msg=key)


def peft_tensors(model):
    library = peft if isinstance(model, peft.PeftModel) else inlay
    return {k: t.clone() for k, t in library.get_peft_model_state_dict(model).items()}


def test_lora_plus_steps_as_pefts():
    theirs, ours = pair()
    before = peft_tensors(ours)
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    for model, make in (
        (theirs, create_loraplus_optimizer),
        (ours, inlay.create_loraplus_optimizer),
    ):
        three_steps(model, make(model, torch.optim.AdamW, **settings))
    assert_same(theirs, ours, before, 1e-5)


def test_lora_plus_gives_each_factor_its_rate():
    model = inlay.get_peft_model(
        build(llama), inlay.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    )
    optimizer = inlay.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16, loraplus_lr_embedding=0.5
    )
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for name, rate in rates.items():
        expected = 0.5 if "embed" in name else 1.6 if name.endswith("lora_B") else 0.1
        assert rate == pytest.approx(expected), name


# PEFT projects in bfloat16 where the machine has it, which costs all but two digits
def test_lora_fa_steps_as_pefts_and_leaves_the_first_factor(monkeypatch):
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    theirs, ours = pair()
    before = peft_tensors(ours)
    # their Adam adds epsilon before it corrects the bias: large gradients do not see it
    three_steps(theirs, create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-3), 1e5)
    three_steps(ours, inlay.create_lorafa_optimizer(ours, r=4, lora_alpha=6, lr=1e-3), 1e5)
    after = peft_tensors(ours)
    for key in before:
        assert torch.equal(after[key], before[key]) == ("lora_A" in key), key
    assert_same(theirs, ours, before, 2e-5)


def test_riemannian_steps_as_pefts():
    theirs, ours = pair()
    before = peft_tensors(ours)
    settings = {"lr": 1e-2, "reg": 0.1}
    for model, make in (
        (theirs, create_riemannian_optimizer),
        (ours, inlay.create_riemannian_optimizer),
    ):
        three_steps(model, make(model, torch.optim.SGD, **settings), 100.0)
    assert_same(theirs, ours, before, 1e-5)


def test_an_optimizer_that_turns_gradients_takes_no_closure():
    _, ours = pair()
    optimizer = inlay.create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1)
    with pytest.raises(UserError, match="takes no closure"):
        optimizer.step(lambda: 1.0)


def test_lora_fa_of_an_invertible_factor_steps_the_weight_along_the_full_gradient():
    torch.manual_seed(0)
    a, full = torch.randn(5, 5), torch.randn(7, 5)
    from inlay.train.factors import nearest_to_full

    scale = 3.0
    # dW = s dB A of the gradient g_B = s G A^T, with A square: G itself
    step = nearest_to_full(scale * full @ a.T, a, scale)
    torch.testing.assert_close(scale * step @ a, full, rtol=1e-4, atol=1e-4)


def test_what_has_no_factors_is_refused():
    model = inlay.get_peft_model(build(llama), inlay.IA3Config())
    with pytest.raises(UserError, match="is for a LoRA in training"):
        inlay.create_lorafa_optimizer(model, lr=1e-3)
    with pytest.raises(UserError, match="none is in training"):
        inlay.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    with pytest.raises(UserError, match="loraplus_lr_ratio=0 must be above 0"):
        inlay.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0)
