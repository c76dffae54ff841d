"""PEFT's files load here and ours load there: same tensors to the bit, same logits, same keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def llama_with_biases() -> Any:
    model = llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    )


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "all-linear": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regular expression": (llama, {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    "rslora": (llama, {**ATTENTION, "use_rslora": True, "lora_alpha": 12}),
    "patterns": (
        llama,
        {**ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    ),
    "layers": (llama, {**ATTENTION, "layers_to_transform": [1]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv2d": (vit, {"target_modules": ["projection", "q_proj", "v_proj"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding of another name": (
        gpt2,
        {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
    ),
    "modules_to_save": (llama, {**ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]}),
    "tied modules_to_save": (tied_llama, {**ATTENTION, "modules_to_save": ["lm_head"]}),
    "task head": (classifier, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "every bias": (llama_with_biases, {**ATTENTION, "bias": "all"}),
    "own biases": (llama_with_biases, {**ATTENTION, "bias": "lora_only"}),
}


def build(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().float().eval()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if (
            "ViT"
            in type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
        ):
            x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
            return model(pixel_values=x).logits
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], Any], dict[str, Any]]:
    make, settings = CASES[request.param]
    return make, {"r": 4, "lora_alpha": 8, **settings}


@pytest.fixture
def theirs(case: Any, tmp_path: Any) -> Any:
    """Return (PEFT's model with a random adapter, the folder it is saved in)."""
    make, settings = case
    model = peft.get_peft_model(build(make), peft.LoraConfig(**settings))
    randomize(model)
    model.eval().save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of its saving and tying
def test_a_file_of_peft_loads_here_with_its_logits_and_goes_back_bit_for_bit(
    case, theirs, tmp_path
):
    make, _ = case
    model, folder = theirs
    expected = output(model)
    ours = inlay.PeftModel.from_pretrained(build(make), folder)
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=1e-6)

    ours.save_pretrained(tmp_path / "ours")
    file = "adapter_model.safetensors"
    before, after = load_file(folder / file), load_file(tmp_path / "ours" / file)
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(make), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_made_here_has_pefts_keys_settings_and_count_and_loads_there(case, tmp_path):
    make, settings = case
    ours = inlay.get_peft_model(build(make), inlay.LoraConfig(**settings))
    randomize(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    model = peft.get_peft_model(build(make), peft.LoraConfig(**settings))
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path / "theirs")
    found, wanted = (
        {
            k: tuple(t.shape)
            for k, t in load_file(tmp_path / p / "adapter_model.safetensors").items()
        }
        for p in ("ours", "theirs")
    )
    assert found == wanted
    mine, their = (
        json.loads((tmp_path / p / "adapter_config.json").read_text()) for p in ("ours", "theirs")
    )
    for changing in ("target_modules", "modules_to_save"):  # sets: PEFT writes them in any order
        for told in (mine, their):
            if isinstance(told[changing], list):
                told[changing] = sorted(told[changing])
    if settings["target_modules"] == "all-linear":  # each spells the shorthand out its own way
        del mine["target_modules"], their["target_modules"]
    assert mine == their
    back = peft.PeftModel.from_pretrained(build(make), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(ours), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_weights_and_the_unloaded_base_are_those_of_peft(case, theirs, request):
    make, _ = case
    model, folder = theirs
    ours = inlay.PeftModel.from_pretrained(build(make), folder)
    before = output(ours)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(output(merged), before, rtol=0, atol=1e-5)
    if "tied" in request.node.callspec.params["case"]:
        return  # PEFT merges into the tied weight, and so changes the layer that had no adapter
    expected = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


def test_a_half_precision_file_of_peft_loads_with_the_same_logits(tmp_path):
    make = lambda: llama().bfloat16()  # noqa: E731
    torch.manual_seed(0)
    base = make()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **ATTENTION))
    randomize(model)
    model.bfloat16().save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = inlay.PeftModel.from_pretrained(make(), tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(make(), tmp_path)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=0, atol=0.02)
