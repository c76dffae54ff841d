"""Repeated layers: the same base weights, an adapter for each; merged right, and undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.methods.lora import LoraConfig
from tests.methods.bases import SMALL, bert, build, llama, output

# PEFT's, of a name in transformers that will go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
RANGES = [[0, 2], [1, 2], [0, 1]]
FILE = "adapter_model.safetensors"


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8))


def repeated(make: Any = llama, **settings: Any) -> Any:
    model = inlay.get_peft_model(
        build(make), LoraConfig(r=2, layer_replication=RANGES, init_lora_weights=False, **settings)
    )
    return model.eval()


@pytest.mark.parametrize("make", [llama, bert])
def test_a_file_of_peft_computes_the_same_here_and_goes_back(make, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, layer_replication=RANGES, init_lora_weights=False)
    theirs = peft.get_peft_model(build(make), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / who / FILE) for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(make), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-5)
    again = inlay.PeftModel.from_pretrained(build(make), tmp_path / "ours")
    torch.testing.assert_close(output(again), output(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [llama, qwen3])
def test_each_layer_has_its_own_adapter_and_merged_its_own_weight(make, tmp_path):
    # PEFT adds every adapter of a layer to the one weight that its copies share, and fails on
    # models that list the kinds of their layers
    model = repeated(make)
    expected = output(model)
    once = inlay.get_peft_model(build(make), LoraConfig(r=2))
    counts = [side.get_nb_trainable_parameters()[0] for side in (model, once)]
    assert counts[0] == 2 * counts[1]
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    read = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(output(read.eval()), expected, rtol=0, atol=1e-5)


def test_the_model_has_its_own_layers_back_once_the_adapter_is_out():
    base = build(qwen3)
    modules, config, plain = dict(base.named_modules()), copy.deepcopy(base.config), output(base)
    settings = LoraConfig(layer_replication=RANGES)
    model = inlay.get_peft_model(base, settings)
    assert base.config.num_hidden_layers == len(base.model.layers) == 4
    assert not torch.allclose(output(model), plain)
    model.unload()
    assert dict(base.named_modules()) == modules
    assert base.config.to_dict() == config.to_dict()
    torch.testing.assert_close(output(base), plain, rtol=0, atol=0)
    with pytest.raises(inlay.UserError, match="names 'nowhere'"):
        inlay.get_peft_model(base, settings.replace(target_modules=["nowhere"]))
    assert dict(base.named_modules()) == modules


def test_a_repeated_model_generates_over_its_cache():
    model, ids = repeated(), torch.tensor([[3, 4, 5]])
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, **told)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **told))


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([[0, 3]], r"has \[0, 3\], and the model has layers 0 to 1"),
        ([[1, 1]], r"has \[1, 1\], and the model"),
        ([[0, 2]] * 3000, "makes more than 4096 layers"),
        ([[0]], "must be pairs of a first layer and an end"),
    ],
)
def test_ranges_that_no_model_has_are_refused(ranges, says):
    base = build(llama)
    modules = dict(base.named_modules())
    with pytest.raises(inlay.UserError, match=says):
        inlay.get_peft_model(base, LoraConfig(layer_replication=ranges))
    assert dict(base.named_modules()) == modules


def test_layers_are_repeated_for_the_first_adapter_of_a_model_alone():
    model = inlay.get_peft_model(build(llama), LoraConfig())
    with pytest.raises(inlay.UserError, match="needs a model with no adapter, not"):
        model.add_adapter("b", LoraConfig(layer_replication=RANGES))
