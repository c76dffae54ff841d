"""MiCA, whose B stays, and LoftQ, which computes over the weight quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.core.errors import UserError
from inlay.inits import loftq
from tests.methods.bases import build, gpt2, llama, output, randomize

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of its files and of transformers
FILE = "adapter_model.safetensors"


# -- MiCA


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]])
def test_mica_begins_with_pefts_factors_and_trains_the_first_alone(targets: list[str]) -> None:
    settings: dict[str, Any] = {"r": 3, "init_lora_weights": "mica", "target_modules": targets}
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(**settings))
    ours = inlay.get_peft_model(build(llama), inlay.LoraConfig(**settings))
    expected = output(build(llama).eval())
    assert torch.equal(output(ours.eval()), expected)
    wanted, found = peft.get_peft_model_state_dict(theirs), inlay.get_peft_model_state_dict(ours)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-5, msg=key)
    for model in (theirs, ours):
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("_A" in name for name in trained)
    ours.set_adapter("default", inference_mode=True)
    ours.set_adapter("default")
    assert sum(p.requires_grad for p in ours.parameters()) == len(trained)


def test_a_mica_file_of_peft_goes_both_ways(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 3, "init_lora_weights": "mica", "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(**settings))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "theirs", is_trainable=True)
    assert {n.rpartition(".")[2] for n, p in ours.named_parameters() if p.requires_grad} == {
        "lora_A"
    }
    torch.testing.assert_close(output(ours.eval()), output(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / who / FILE) for who in ("theirs", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-5)


# -- LoftQ


def test_four_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 70)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    wanted = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(loftq.rounded(weight, 4), wanted, rtol=0, atol=2e-6)


def test_eight_bits_are_no_further_off_than_half_a_step() -> None:
    weight = torch.randn(6, 50)
    step = weight.abs().amax(1, keepdim=True) / 127
    rounded = loftq.rounded(weight, 8)
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(loftq.rounded(torch.zeros(2, 3), 8), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_factors_make_up_for_the_most_of_what_was_lost(bits: int) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(64, 64), 3.0
    errors = []
    for turns in (1, 5):
        q, b, a = loftq.quantized(weight, 16, scale, bits=bits, turns=turns)
        errors.append(float((weight - q - scale * b @ a).norm()))
        singular = torch.linalg.svdvals(weight - q)
        assert errors[-1] == pytest.approx(float(singular[16:].norm()), rel=1e-4)
    alone = float((weight - loftq.rounded(weight, bits)).norm())
    assert errors[1] < errors[0] < alone


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_with_loftq_is_near_its_base_and_computes_over_the_quantized(bits: int) -> None:
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 24,
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": bits, "loftq_iter": 2},
        "target_modules": ["c_attn", "c_fc"],
        "fan_in_fan_out": True,
    }
    base = build(gpt2).eval()
    expected = output(base)
    model = inlay.get_peft_model(base, inlay.LoraConfig(**settings)).eval()
    near = (output(model) - expected).norm()
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    with torch.no_grad():
        for _, host, adapter in model.roster.adapters("default"):
            adapter.lora.lora_B.zero_()
            weight = host.base.weight() + adapter.lost
            torch.testing.assert_close(weight, loftq.rounded(weight, bits), rtol=0, atol=1e-5)
    assert near < (output(model) - expected).norm()


def test_a_loftq_file_needs_the_base_alone_and_merges_into_the_quantized(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 4, "init_lora_weights": "loftq", "target_modules": ["q_proj"]}
    model = inlay.get_peft_model(build(llama), inlay.LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.add_(0.1 * torch.randn(p.shape))
    expected = output(model.eval())
    model.save_pretrained(tmp_path)
    assert any(key.endswith("q_proj.lora_A.weight") for key in load_file(tmp_path / FILE))
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    assert torch.equal(output(back), expected)
    torch.testing.assert_close(output(back.merge_and_unload().eval()), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no product of two factors"):
        model.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    assert back.convert_to_lora("default", 1.0, "plain").total < 1e-4


def test_what_loftq_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="loftq_bits=2 is not one of 4, 8"):
        inlay.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 2})
    with pytest.raises(UserError, match="LoftQ cannot be set"):
        inlay.get_peft_model(
            nn.Sequential(nn.Embedding(8, 8)),
            inlay.LoraConfig(target_modules=["0"], r=2, init_lora_weights="loftq"),
        )


def test_replacing_factors_makes_up_for_what_a_quantized_base_lost(tmp_path: Path) -> None:
    whole = build(llama).eval()
    whole.save_pretrained(tmp_path)
    expected = output(whole)
    base = build(llama).eval()
    with torch.no_grad():
        for path, module in base.named_modules():
            if path.endswith("_proj"):
                module.weight.copy_(loftq.rounded(module.weight, 4))
    model = inlay.get_peft_model(
        base, inlay.LoraConfig(r=8, lora_alpha=24, target_modules="all-linear")
    ).eval()
    lossy = (output(model) - expected).norm()
    inlay.replace_lora_weights_loftq(model, tmp_path)
    assert (output(model) - expected).norm() < 0.9 * lossy
    kept = {k: t.clone() for k, t in inlay.get_peft_model_state_dict(model).items()}
    with pytest.raises(UserError, match="no folder or file"):
        inlay.replace_lora_weights_loftq(model)
    inlay.replace_lora_weights_loftq(model, tmp_path, callback=lambda *_: False)
    assert all(
        torch.equal(t, kept[key]) for key, t in inlay.get_peft_model_state_dict(model).items()
    )
