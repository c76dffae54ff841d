"""`prepare_model_for_kbit_training` beside PEFT's, and what its cast of the norms comes to."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import peft
import pytest
import torch

import inlay
from inlay import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from inlay.bases.nf4 import PackedLinear
from inlay.core.errors import UserError

# PEFT asks models for what transformers has renamed, and torch for what it has too
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def packed():
    return inlay.load_base(quantize="nf4", dtype="bfloat16")[0]


def told(model):
    return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def checkpoints(model):
    return [getattr(m, "gradient_checkpointing", None) for m in model.modules()]


def test_a_model_that_is_not_packed_is_frozen_and_cast_as_by_peft(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True).bfloat16()
    theirs = peft.prepare_model_for_kbit_training(copy.deepcopy(model))
    ours = prepare_model_for_kbit_training(copy.deepcopy(model))
    assert told(ours) == told(theirs)
    assert {dtype for dtype, _ in told(ours).values()} == {torch.float32}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert checkpoints(ours) == checkpoints(theirs)
    assert not any(checkpoints(ours))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_a_packed_model_trains_as_one_that_peft_prepared(packed, kwargs):
    theirs = copy.deepcopy(packed)
    theirs.is_loaded_in_4bit = True
    theirs = peft.prepare_model_for_kbit_training(theirs, gradient_checkpointing_kwargs=kwargs)
    ours = prepare_model_for_kbit_training(
        copy.deepcopy(packed), gradient_checkpointing_kwargs=kwargs
    )
    assert told(ours) == told(theirs)
    assert checkpoints(ours) == checkpoints(theirs)
    assert any(checkpoints(ours))
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.02)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_without_checkpointing_there_is_none(packed):
    model = prepare_model_for_kbit_training(copy.deepcopy(packed), use_gradient_checkpointing=False)
    assert not any(checkpoints(model))
    assert {dtype for dtype, _ in told(model).values()} == {torch.float32}


def test_the_backward_pass_has_the_adapters_that_the_forward_pass_had(packed):
    # also where they are set in after the model began to checkpoint
    model = get_peft_model(
        prepare_model_for_kbit_training(copy.deepcopy(packed)), LoraConfig(r=4, lora_alpha=64)
    )
    model.train()

    def gradient(context):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        with context:
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, switched = gradient(nullcontext()), gradient(model.disable_adapter())
    assert any(grad is not None and grad.any() for grad in plain.values())
    torch.testing.assert_close(switched, plain, rtol=0, atol=0)


def test_under_autocast_norms_in_float32_change_no_bit(packed):
    # which is why a recipe leaves them as they are stored
    stored, cast = copy.deepcopy(packed), copy.deepcopy(packed)
    for ours, theirs in zip(stored.parameters(), cast.parameters(), strict=True):
        if ours.ndim == 1:
            ours.data = ours.data * 1.7
            theirs.data = ours.data.float()
    assert {p.dtype for p in cast.parameters()} == {torch.float32, torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = stored(IDS).logits, cast(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_a_packed_model_that_cannot_checkpoint_is_refused(kwargs):
    model = torch.nn.Sequential(PackedLinear.of(torch.nn.Linear(64, 64)))
    with pytest.raises(UserError, match="Sequential cannot checkpoint"):
        prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    assert model[0].bias.requires_grad  # and is left as it was
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_what_has_adapters_is_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4))
    with pytest.raises(UserError, match="call it before get_peft_model"):
        prepare_model_for_kbit_training(model)
