"""A base in 4 bits: packed as it is read, saved and read again here and by bitsandbytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay import UserError
from inlay.bases import view
from inlay.bases.nf4 import PackedLinear
from inlay.kernels import codec
from inlay.methods.full import FullConfig
from inlay.methods.lora import LoraConfig
from inlay.model import packing, quantizer
from inlay.model.roster import Roster

IDS = torch.arange(3, 43).reshape(2, 20)
WEIGHTS = "model.safetensors"


def tiny(folder: Path, dtype: torch.dtype = torch.float32, **given: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings | given)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    # with gradients on: without, bitsandbytes computes on the CPU in bfloat16
    return model(input_ids=IDS).logits.detach()


def packed(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]


def dequantized(model: Any) -> Any:
    assert packing.unpack(model)
    return model


@pytest.mark.parametrize("kind", codec.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_but_the_head_is_in_codes_of_its_weight(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    plain, _ = inlay.load_base(tiny(tmp_path, dtype), device="cpu")
    model, _ = inlay.load_base(tmp_path, quantize=kind, device="cpu")
    linears = [path for path, module in plain.named_modules() if isinstance(module, nn.Linear)]
    assert packed(model) == [path for path in linears if path != "lm_head"]
    assert packing.count(model) == (14, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96))
    for path in packed(model):
        weight = codec.quantize(plain.get_submodule(path).weight, kind)
        meant = codec.dequantize(weight, dtype=dtype)
        assert torch.equal(view(model.get_submodule(path)).weight(), meant)
        plain.get_submodule(path).weight.data = meant
    assert torch.equal(logits(model), logits(plain))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not hasattr(model, "hf_quantizer")
    assert not model.training


def test_tied_weights_stay_tied_and_shards_are_read_in_turn(tmp_path: Path) -> None:
    tiny(tmp_path / "one", tie_word_embeddings=True)
    model, _ = inlay.load_base(tmp_path / "one", device="cpu")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (
        inlay.load_base(tmp_path / name, quantize="nf4", device="cpu")[0]
        for name in ("one", "many")
    )
    assert many.lm_head.weight is many.model.embed_tokens.weight
    assert torch.equal(logits(one), logits(many))


@pytest.mark.parametrize("kind", codec.KINDS)
def test_a_weight_that_no_block_divides_ends_in_a_shorter_one(tmp_path: Path, kind: str) -> None:
    tiny(tmp_path, hidden_size=36, intermediate_size=27, head_dim=16)
    plain, _ = inlay.load_base(tmp_path, device="cpu")
    model, _ = inlay.load_base(tmp_path, quantize=kind, device="cpu")
    path = "model.layers.1.mlp.up_proj"
    assert plain.get_submodule(path).weight.numel() == 972  # 15 blocks of 64, and 12 values
    meant = codec.dequantize(codec.quantize(plain.get_submodule(path).weight, kind))
    assert torch.equal(view(model.get_submodule(path)).weight(), meant)
    model.save_pretrained(tmp_path / "packed")
    again, _ = inlay.load_base(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_a_terminal_sees_how_far_loading_is(tmp_path: Path, monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            inlay.load_base(tiny(tmp_path), quantize="nf4", device="cpu")
        told = stream.getvalue()
        assert ("Loading weights" in told and "21/21" in told) == shown


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_bitsandbytes_loads_here_and_ours_loads_there(
    tmp_path: Path, double: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(
        tiny(tmp_path / "base", intermediate_size=128), quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = inlay.load_base(tmp_path / "theirs", device="cpu")
    assert len(packed(ours)) == 14
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-3)
    same, _ = inlay.load_base(tmp_path / "theirs", quantize="nf4", device="cpu")
    assert torch.equal(logits(same), logits(ours))

    mine, _ = inlay.load_base(tmp_path / "base", quantize="nf4", device="cpu")
    for number, model in enumerate((mine, ours)):
        model.save_pretrained(tmp_path / f"{number}")
        again, _ = inlay.load_base(tmp_path / f"{number}", device="cpu")
        assert torch.equal(logits(again), logits(model))
        there = auto.from_pretrained(tmp_path / f"{number}")
        assert type(there.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        torch.testing.assert_close(logits(there), logits(model), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_an_8_bit_checkpoint_of_bitsandbytes_holds_the_same_weights_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    auto = transformers.AutoModelForCausalLM
    # in float16, as bitsandbytes takes it to be
    base = tiny(tmp_path / "base", torch.float16)
    theirs = auto.from_pretrained(base, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = inlay.load_base(tmp_path / "theirs", device="cpu")
    mine, _ = inlay.load_base(base, quantize="int8", device="cpu")
    mine.save_pretrained(tmp_path / "mine")
    there = auto.from_pretrained(tmp_path / "mine")
    assert len(packed(ours)) == 14
    for path in packed(ours):
        layers = [model.get_submodule(path) for model in (theirs, ours, mine, there)]
        codes = [getattr(layer.weight, "CB", None) for layer in layers]
        codes = [
            layer.weight.data if held is None else held
            for layer, held in zip(layers, codes, strict=True)
        ]
        assert all(torch.equal(one, codes[0]) for one in codes), path
    # they round what goes into a layer as well, we do not
    torch.testing.assert_close(logits(there), logits(mine), rtol=0, atol=0.5)


def test_an_adapter_trains_over_it_and_the_base_does_not(tmp_path: Path) -> None:
    base, _ = inlay.load_base(tiny(tmp_path), quantize="nf4", device="cpu")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = inlay.get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_a_packed_base_goes_to_a_file_and_back_and_merges(tmp_path: Path) -> None:
    def base() -> Any:
        return inlay.load_base(tmp_path / "base", quantize="nf4", device="cpu")[0]

    tiny(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = inlay.get_peft_model(base(), settings).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = inlay.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    # over the 16-bit base it was not trained on, it is still that base's: only packing differs
    inlay.PeftModel.from_pretrained(inlay.load_base(tmp_path / "base")[0], tmp_path / "adapter")
    merged = loaded.merge_and_unload()
    assert len(packed(merged)) == 10
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    skipped = merged.config.quantization_config["llm_int8_skip_modules"]
    assert len(skipped) == 5
    merged.save_pretrained(tmp_path / "merged")
    again, _ = inlay.load_base(tmp_path / "merged", device="cpu")
    assert torch.equal(logits(again), logits(merged))
    assert torch.equal(logits(dequantized(merged)), logits(again))
    assert not hasattr(merged.config, "quantization_config")


def test_the_head_of_a_task_stays_in_plain_numbers() -> None:
    model, _ = inlay.load_base(quantize="nf4", task_type="SEQ_CLS", labels=["a", "b"])
    assert type(model.score) is nn.Linear
    assert model.score.weight.isfinite().all()


def test_what_a_task_adds_to_a_checkpoint_is_drawn_in_plain_numbers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "vocab_size": 64}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path)
    model, _ = inlay.load_base(tmp_path, quantize="nf4", task_type="SEQ_CLS", labels=["a", "b"])
    assert len(packed(model)) == 6
    assert type(model.bert.pooler.dense) is nn.Linear  # the checkpoint has none
    assert model.bert.pooler.dense.weight.std() < 0.05
    assert torch.equal(model.bert.pooler.dense.bias, torch.zeros(32))
    skipped = model.config.quantization_config["llm_int8_skip_modules"]
    assert skipped == ["bert.pooler.dense", "classifier"]


def claims(folder: Path, told: dict[str, Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"quantization_config": told}
    path.write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantized already, by gptq.*the 16-bit model"),
        ({"quant_method": "awq", "bits": 4}, r"quantized already, by awq"),
        ({"quant_method": "fp8"}, r"quantized already, by fp8"),
        ({"quant_method": "compressed-tensors"}, r"by compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, r"by bitsandbytes"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
            r"quantized already, as int8",
        ),
        ({"bits": 4}, r"by an unnamed scheme"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            r"quantized already, as fp4; leave quantize='nf4' out",
        ),
    ],
)
def test_a_base_that_another_scheme_packed_is_refused_by_its_name(
    tmp_path: Path, told: dict[str, Any], match: str
) -> None:
    claims(tiny(tmp_path), told)
    with pytest.raises(UserError, match=match):
        inlay.load_base(tmp_path, quantize="nf4")


def test_what_cannot_be_packed_is_one_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nf5' is not one of none, nf4, fp4, int8. Did you mean"):
        inlay.load_base(quantize="nf5")
    path = tiny(tmp_path) / WEIGHTS
    tensors = load_file(path)
    key = "model.layers.1.mlp.up_proj.weight"
    for value, match in (
        (tensors[key] / 0, rf"{key}: a weight with values that are NaN or infinite"),
        (tensors[key][:5].clone(), rf"{key}: \[5, 64\] in the checkpoint"),
    ):
        save_file(tensors | {key: value}, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=match):
            inlay.load_base(tmp_path, quantize="nf4")
    save_file({k: v for k, v in tensors.items() if k != key}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"holds no weights for 1 of .*{key}"):
        inlay.load_base(tmp_path, quantize="nf4")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match="no whole safetensors file"):
        inlay.load_base(tmp_path, quantize="nf4")


def test_a_packed_checkpoint_that_is_not_whole_is_one_error(tmp_path: Path) -> None:
    base, _ = inlay.load_base(tiny(tmp_path / "base"), quantize="nf4", device="cpu")
    base.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    key = "model.layers.1.mlp.up_proj.weight"
    for number, kept in enumerate(
        (
            {k: v for k, v in tensors.items() if k != f"{key}.absmax"},
            {k: v for k, v in tensors.items() if k != key},
            {k: v for k, v in tensors.items() if "up_proj.weight.quant_state" not in k},
            tensors | {f"{key}.absmax": tensors[f"{key}.absmax"][:3].clone()},
        )
    ):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "whole", folder)
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"up_proj.weight"):
            inlay.load_base(folder)


def test_a_model_without_linears_of_torchs_kind_says_so(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**small)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no linear layers that can be packed"):
        inlay.load_base(tmp_path, quantize="nf4")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_shard_that_was_packed_does_not_stay_in_memory(tmp_path: Path) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/smaps").read_text().split("\n")
        inside, pages = False, 0
        for line in lines:
            if "-" in line.split(" ")[0]:
                inside = line.endswith(WEIGHTS)
            pages += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
        return pages

    wide = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 32}
    tiny(tmp_path, torch.bfloat16, **wide)
    with open(tmp_path / WEIGHTS, "rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet cannot leave memory
    size = (tmp_path / WEIGHTS).stat().st_size // 1024
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        weight = file.get_slice("model.layers.1.mlp.up_proj.weight")[...]
        total, touched = weight.float().sum(), mapped()
        quantizer._let_go(weight)
        if mapped() >= touched:
            pytest.skip("this file system keeps what is mapped in memory")
        assert weight.float().sum() == total  # it is read again
    del weight
    before = mapped()
    model, _ = inlay.load_base(tmp_path, quantize="nf4", device="cpu")
    assert packing.count(model)[1] > 1.9e6
    assert mapped() - before < size / 3


def test_weights_in_four_bits_are_not_trained_themselves() -> None:
    model, _ = inlay.load_base(quantize="nf4")
    with pytest.raises(UserError, match="packed cannot move"):
        Roster(model).add("a", FullConfig())
