"""Adapters in models that stay their own class: injected, filled, read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay import LoraConfig, UserError, get_peft_model

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
IDS = torch.arange(3, 13)[None]


def test_an_injected_adapter_is_the_one_of_a_peft_model(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama(), CONFIG).eval()
    tensors = inlay.get_peft_model_state_dict(model)
    plain = inlay.inject_adapter_in_model(CONFIG, tiny_llama())
    assert type(plain).__name__ == "LlamaForCausalLM"
    for given in (tensors, {k.removeprefix("base_model.model."): t for k, t in tensors.items()}):
        inlay.set_peft_model_state_dict(plain, given)
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    found = inlay.get_peft_model_state_dict(plain)
    assert found.keys() == tensors.keys()


def test_without_memory_until_it_is_filled(tiny_llama: Any) -> None:
    tensors = inlay.get_peft_model_state_dict(get_peft_model(tiny_llama(), CONFIG))
    plain = inlay.inject_adapter_in_model(CONFIG, tiny_llama(), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in plain.parameters())
    inlay.set_peft_model_state_dict(plain, tensors)
    assert not any(p.is_meta for p in plain.parameters())
    found = inlay.get_peft_model_state_dict(plain)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_state_dict_can_say_which_modules_are_meant(tiny_llama: Any) -> None:
    config = CONFIG.replace(target_modules=["k_proj"], layers_to_transform=[1])
    tensors = inlay.get_peft_model_state_dict(get_peft_model(tiny_llama(), config))
    plain = inlay.inject_adapter_in_model(CONFIG, tiny_llama(), state_dict=tensors)
    assert inlay.get_peft_model_state_dict(plain).keys() == tensors.keys()
    with pytest.raises(UserError, match="names no module"):
        inlay.inject_adapter_in_model(CONFIG, tiny_llama(), state_dict={"x.lora_A.weight": IDS})


def test_any_torch_module_takes_adapters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5))
    x = torch.randn(2, 3, 8, 8)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    expected = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=0, atol=1e-5)


def test_a_model_without_adapters_has_no_state_dict_of_them(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="holds no adapters"):
        inlay.get_peft_model_state_dict(tiny_llama())
    with pytest.raises(UserError, match="add_adapter"):
        inlay.inject_adapter_in_model(CONFIG, get_peft_model(tiny_llama(), CONFIG))
