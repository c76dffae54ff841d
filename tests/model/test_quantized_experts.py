"""A mixture's experts are packed as they are read, saved and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay import UserError
from inlay.bases._experts import PackedExperts
from inlay.kernels import codec
from inlay.methods.lora import LoraConfig
from inlay.model import packing

IDS = torch.arange(3, 43).reshape(2, 20)
WEIGHTS = "model.safetensors"
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe")


def tiny(folder: Path, family: str = "mixtral", **given: Any) -> Path:
    """Save a mixture with random weights: two layers of four experts of 128 x 64 and 64 x 64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    settings |= {"num_experts_per_tok": 2, "intermediate_size": 64, "moe_intermediate_size": 64}
    number = {"num_experts": 4} if family == "qwen3_moe" else {"num_local_experts": 4}
    config = AutoConfig.for_model(family, **settings | number | given)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.detach()


def mixtures(model: nn.Module) -> dict[str, PackedExperts]:
    return {path: m for path, m in model.named_modules() if isinstance(m, PackedExperts)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stack_is_in_codes_of_its_weight_and_so_in_a_file(
    tmp_path: Path, family: str, kind: str
) -> None:
    plain, _ = inlay.load_base(tiny(tmp_path / "base", family), device="cpu")
    model, _ = inlay.load_base(tmp_path / "base", quantize=kind, device="cpu")
    assert len(mixtures(model)) == 2
    for path, module in mixtures(model).items():
        assert module.in_codes == ["gate_up_proj", "down_proj"]
        for name in module.in_codes:
            weight = plain.get_parameter(f"{path}.{name}")
            meant = codec.dequantize(codec.quantize(weight, kind))
            assert torch.equal(module.numbers(name), meant)
    experts = 2 * 4 * (128 * 64 + 64 * 64)
    assert packing.count(model) == (10, experts + 2 * (2 * 64 * 64 + 2 * 32 * 64))
    model.save_pretrained(tmp_path / "packed")
    names = list(load_file(tmp_path / "packed" / WEIGHTS))
    inside = r"\.(experts\.down_proj|output_linear\.weight)\.(absmax|SCB)$"
    assert len([name for name in names if re.search(inside, name)]) == 2
    again, _ = inlay.load_base(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(again), logits(model))

    assert packing.unpack(again) == 10
    assert not hasattr(again.config, "quantization_config")
    again.save_pretrained(tmp_path / "plain")
    assert (
        load_file(tmp_path / "plain" / WEIGHTS).keys()
        == load_file(tmp_path / "base" / WEIGHTS).keys()
    )
    torch.testing.assert_close(
        logits(inlay.load_base(tmp_path / "plain", device="cpu")[0]), logits(model)
    )


@pytest.mark.filterwarnings("ignore")
def test_what_bitsandbytes_saves_of_a_mixture_has_its_experts_in_16_bits_here_too(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tiny(tmp_path / "base"), quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = inlay.load_base(tmp_path / "theirs", device="cpu")
    assert not mixtures(ours)
    assert packing.count(ours)[0] == 8
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-3)
    mine, _ = inlay.load_base(tmp_path / "base", quantize="nf4", device="cpu")
    mine.save_pretrained(tmp_path / "mine")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # and not at random
        auto.from_pretrained(tmp_path / "mine")


def test_experts_that_were_merged_are_plain_in_the_file_and_when_it_is_read(
    tmp_path: Path,
) -> None:
    base, _ = inlay.load_base(tiny(tmp_path / "base"), quantize="nf4", device="cpu")
    settings = LoraConfig(
        r=2, target_parameters=["layers.1.mlp.experts.down_proj"], init_lora_weights=False
    )
    model = inlay.get_peft_model(base, settings).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = inlay.PeftModel.from_pretrained(
        inlay.load_base(tmp_path / "base", quantize="nf4", device="cpu")[0], tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert list(mixtures(merged)) == ["model.layers.0.mlp.experts"]
    merged.save_pretrained(tmp_path / "merged")
    again, _ = inlay.load_base(tmp_path / "merged", device="cpu")
    assert torch.equal(logits(again), logits(merged))
    assert list(mixtures(again)) == list(mixtures(merged))
    assert type(again.get_submodule("model.layers.1.mlp.experts")).__name__ == "MixtralExperts"


def test_a_stack_that_cannot_be_read_is_one_error_that_names_it(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "gpt_oss")
    tensors = load_file(base / WEIGHTS)
    key = "model.layers.1.mlp.experts.down_proj"
    for value, match in (
        (tensors[key] / 0, rf"{key}: a weight with values that are NaN or infinite"),
        (tensors[key][:3].clone(), rf"{key}: \[3, 64, 64\] in the checkpoint"),
    ):
        save_file(tensors | {key: value}, base / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=match):
            inlay.load_base(base, quantize="nf4", device="cpu")
    save_file(
        {k: v for k, v in tensors.items() if k != key}, base / WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=rf"holds no weights for 1 of .*{key}"):
        inlay.load_base(base, quantize="nf4", device="cpu")

    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    inlay.load_base(base, quantize="nf4", device="cpu")[0].save_pretrained(tmp_path / "packed")
    codes = load_file(tmp_path / "packed" / WEIGHTS)
    for lacking in ("down_proj.absmax", "down_proj"):
        kept = {k: v for k, v in codes.items() if k != key.replace("down_proj", lacking)}
        save_file(kept, tmp_path / "packed" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=key):
            inlay.load_base(tmp_path / "packed", device="cpu")


def test_experts_packed_one_by_one_are_named_and_refused(tmp_path: Path) -> None:
    base = tiny(tmp_path)
    config = json.loads((base / "config.json").read_text("utf-8"))
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": told}), "utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(base / WEIGHTS).items():
        if ".experts." in name:
            codes = codec.quantize(value)
            tensors |= {name: codes.codes[:, None], f"{name}.absmax": codes.absmax}
        else:
            tensors[name] = value
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"experts one by one.*the 16-bit model"):
        inlay.load_base(base, device="cpu")
