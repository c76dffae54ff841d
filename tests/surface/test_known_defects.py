"""Defects of PEFT 0.21 that are not to be repeated: each test fails there and passes here.

Both libraries run the same lines, for the names are the same; PEFT's run is expected to fail, and a
version of it that no longer does fails this file, so that the list stays true.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from tests.methods.bases import build, gpt2, llama, output, randomize

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FILE = "adapter_model.safetensors"
has_it = pytest.param(peft, id="peft", marks=pytest.mark.xfail(strict=True))
both = pytest.mark.parametrize("lib", [pytest.param(inlay, id="inlay"), has_it])


class Net(nn.Module):
    """Any torch module, with names that look like an adapter's or like a head's."""

    def __init__(self) -> None:
        super().__init__()
        self.my_lora_block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.sub_head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sub_head(self.head(self.my_lora_block(x).tanh()))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def conv(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, **settings)).double().eval()


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 2 * 9 * 8, dtype=torch.float64).reshape(2, 2, 9, 8)


def random(lib: Any, model: nn.Module, config: Any) -> Any:
    torch.manual_seed(2)
    made = lib.get_peft_model(model, config).eval()
    randomize(made)
    return made


@both
def test_a_dilated_convolution_takes_lora(lib: Any) -> None:
    model = random(lib, conv(dilation=2, padding=2), lib.LoraConfig(r=2, target_modules=["0"]))
    assert model(images()).shape == (2, 4, 9, 8)


@both
@pytest.mark.parametrize("method", ["Lora", "Hira"])
def test_a_convolution_with_another_padding_runs_what_it_merges(lib: Any, method: str) -> None:
    config = getattr(lib, f"{method}Config")(r=2, target_modules=["0"])
    model = random(lib, conv(padding=1, padding_mode="circular"), config)
    ran = model(images())
    torch.testing.assert_close(model.merge_and_unload()(images()), ran, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize(
    "settings", [{"kernel_size": 3}, {"kernel_size": 3, "padding": 1}], ids=str
)
def test_oft_on_a_convolution_starts_from_the_base_and_runs_what_it_merges(
    lib: Any, settings: Any
) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, **settings)).eval()

    x = images().float()
    config = lib.OFTConfig(oft_block_size=2, r=0, target_modules=["0"])
    model = lib.get_peft_model(base(), config).eval()
    torch.testing.assert_close(model(x), base()(x), rtol=1e-4, atol=1e-5)
    randomize(model, 0.3)
    ran = model(x)
    assert not torch.allclose(ran, base()(x), atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(x), ran, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("method", ["C3A", "OFT"])
def test_two_active_adapters_run_what_they_merge(lib: Any, method: str) -> None:
    settings = {"C3A": {"block_size": 2}, "OFT": {"oft_block_size": 3, "r": 0}}[method]
    config = getattr(lib, f"{method}Config")(target_modules=["my_lora_block"], **settings)
    model = lib.get_peft_model(net(), config, "a")
    model.add_adapter("b", config)
    choose = model.set_adapter if lib is inlay else model.base_model.set_adapter
    choose(["a", "b"])
    randomize(model.requires_grad_(True), 0.5)
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    ran = model.eval()(x)
    merged = model.merge_and_unload(adapter_names=["a", "b"])
    torch.testing.assert_close(merged(x), ran, rtol=1e-4, atol=1e-5)


@both
def test_rows_of_a_batch_have_adapters_of_any_method(lib: Any) -> None:
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = random(lib, build(llama), lib.IA3Config(**config))
    model.add_adapter("other", lib.IA3Config(**config))
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        alone = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        mixed = model(ids, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], alone[1])


@both
def test_an_error_in_a_mixed_batch_leaves_the_model_usable(lib: Any) -> None:
    model = random(lib, build(llama), lib.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(3, 23).reshape(2, 10)
    before = output(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids + 1000, adapter_names=["__base__", "default"])
    torch.testing.assert_close(output(model), before)


@both
def test_unmerging_restores_half_precision_weights_to_the_bit(lib: Any) -> None:
    base = build(llama).bfloat16()
    model = random(lib, base, lib.LoraConfig(r=4, target_modules=["q_proj"]))
    kept = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]), name


@both
def test_a_safe_merge_is_as_exact_as_another(lib: Any) -> None:
    merged = []
    for safe in (False, True):
        model = random(lib, build(llama).bfloat16(), lib.LoraConfig(target_modules=["q_proj"]))
        merged.append(model.merge_and_unload(safe_merge=safe).state_dict())
    for name, weight in merged[0].items():
        assert torch.equal(weight, merged[1][name]), name


@both
def test_a_deleted_adapter_is_gone_from_every_layer(lib: Any) -> None:
    model = random(lib, net(), lib.LoraConfig(r=2, target_modules=["my_lora_block"]))
    model.add_adapter("other", lib.LoraConfig(r=2, target_modules=["my_lora_block"]))
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_parameters() if ".other" in name]


@both
def test_modules_to_save_are_those_named_and_no_others(lib: Any) -> None:
    config = lib.LoraConfig(r=2, target_modules=["my_lora_block"], modules_to_save=["head"])
    model = lib.get_peft_model(net(), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("head" in name for name in trained)
    assert not [name for name in trained if "sub_head" in name]


@both
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_name_that_is_nowhere_in_the_model_is_an_error(lib: Any, field: str) -> None:
    config = {"target_modules": ["my_lora_block"], field: ["my_lora_block", "haed"]}
    with pytest.raises(ValueError, match="haed"):
        lib.get_peft_model(net(), lib.LoraConfig(r=2, **config))


@both
@pytest.mark.parametrize("change", ["unexpected", "missing"])
def test_a_file_that_does_not_fit_is_an_error(lib: Any, change: str, tmp_path: Path) -> None:
    config = lib.LoraConfig(r=2, target_modules=["my_lora_block"])
    lib.get_peft_model(net(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    if change == "missing":
        tensors.popitem()
    else:
        tensors["base_model.model.tail.lora_A.weight"] = torch.zeros(2, 6)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    (tmp_path / "inlay.json").unlink(missing_ok=True)  # which would tell of any change at all
    with pytest.raises((ValueError, RuntimeError), match=change):
        lib.PeftModel.from_pretrained(net(), tmp_path)


@both
@pytest.mark.parametrize("name", ["a", "lora"])
def test_a_short_adapter_name_is_no_reason_to_warn(lib: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        lib.get_peft_model(net(), lib.LoraConfig(target_modules=["my_lora_block"]), name)


@both
def test_a_merged_model_is_not_left_unmerged_by_disabling_its_adapter(lib: Any) -> None:
    model = random(lib, net(), lib.LoraConfig(r=2, target_modules=["my_lora_block"]))
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model.merge_adapter()
    adapted = model(x)
    with contextlib.suppress(inlay.UserError), model.disable_adapter():  # here it is refused
        model(x)
    torch.testing.assert_close(model(x), adapted)
    weight = model.base_model.model.my_lora_block.base_layer.weight
    assert not torch.allclose(weight, net().my_lora_block.weight), "it is no longer merged"


@both
def test_one_configuration_serves_two_models(lib: Any) -> None:
    config = lib.LoraConfig(r=2, target_modules="all-linear")
    lib.get_peft_model(build(llama), config)
    assert config.target_modules == "all-linear"
    lib.get_peft_model(build(gpt2), config)


@both
def test_a_configuration_is_not_changed_by_the_layers_it_meets(lib: Any) -> None:
    config = lib.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=False)
    lib.get_peft_model(build(gpt2), config)
    assert config.fan_in_fan_out is False


@both
def test_the_base_trains_again_once_the_adapter_is_unloaded(lib: Any) -> None:
    base = net()
    lib.get_peft_model(base, lib.LoraConfig(target_modules=["my_lora_block"])).unload()
    assert all(parameter.requires_grad for parameter in base.parameters())


@both
def test_choosing_an_adapter_loaded_for_inference_does_not_make_it_train(
    lib: Any, tmp_path: Path
) -> None:
    config = lib.LoraConfig(r=2, target_modules=["my_lora_block"])
    lib.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = lib.PeftModel.from_pretrained(net(), tmp_path)
    model.set_adapter("default")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


@both
def test_adapting_a_model_raises_no_deprecation_of_a_third_library(lib: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        lib.get_peft_model(build(llama), lib.LoraConfig(target_modules=["q_proj"]))


def test_an_embedding_that_renormalizes_is_refused_where_peft_computes_something_else() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(inlay.UserError, match="'0' is a Embedding"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["0"]))


def test_the_output_that_is_compared_is_not_the_bases() -> None:
    model = random(inlay, build(llama), inlay.LoraConfig(target_modules=["q_proj"]))
    assert not torch.allclose(output(model), output(build(llama)), atol=1e-4)
