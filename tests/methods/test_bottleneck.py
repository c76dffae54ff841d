"""Bottleneck adapters beside five lines of plain torch, on whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import inlay
from inlay import BottleneckConfig, LoraConfig, UserError, get_peft_model
from tests.methods.bases import bert, build, gpt2, llama, output, randomize, t5

SITES = {
    ("houlsby", llama): 4,
    ("pfeiffer", llama): 2,
    ("parallel", llama): 2,
    ("houlsby", gpt2): 4,
    ("pfeiffer", gpt2): 2,
    ("parallel", gpt2): 2,
    ("houlsby", bert): 4,
    ("pfeiffer", bert): 2,
    ("houlsby", t5): 10,  # the decoder's blocks attend twice
    ("pfeiffer", t5): 4,
    ("parallel", t5): 4,
}


@pytest.mark.parametrize(("style", "make"), SITES)
def test_each_style_has_its_usual_sites_and_comes_back_from_its_file(style, make, tmp_path: Path):
    base = build(make)
    plain = output(base)
    torch.manual_seed(0)
    model = get_peft_model(base, BottleneckConfig(style=style, reduction_factor=4)).eval()
    assert len(model.roster.hosts) == SITES[style, make]
    torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    randomize(model, 0.5)
    trained = output(model)
    assert not torch.allclose(trained, plain, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(build(make), tmp_path)
    torch.testing.assert_close(output(again), trained, rtol=0, atol=0)
    with pytest.raises(UserError, match="'default' is a Bottleneck, which no weight can say"):
        again.merge_and_unload()
    torch.testing.assert_close(output(again.unload()), plain, rtol=0, atol=0)


def test_it_is_a_small_network_over_the_last_layer_of_a_block() -> None:
    model = get_peft_model(build(llama), BottleneckConfig(non_linearity="silu", reduction_factor=4))
    randomize(model)
    own = build(llama)
    for i, layer in enumerate(own.model.layers):
        host = model.roster.hosts[f"model.layers.{i}.mlp.down_proj"].adapters["default"]

        def after(module, args, y, host=host):
            inner = torch.nn.functional.silu(y @ host.down.T + host.down_bias)
            return y + inner @ host.up.T + host.up_bias

        layer.mlp.register_forward_hook(after)
    torch.testing.assert_close(output(model), output(own))


def test_a_block_that_returns_a_tuple_keeps_what_else_it_returns() -> None:
    model = get_peft_model(build(llama), BottleneckConfig(target_modules=["self_attn"]))
    randomize(model)
    own = build(llama)
    for i, layer in enumerate(own.model.layers):
        host = model.roster.hosts[f"model.layers.{i}.self_attn"].adapters["default"]

        def after(module, args, out, host=host):
            inner = torch.relu(out[0] @ host.down.T + host.down_bias)
            return out[0] + inner @ host.up.T + host.up_bias, *out[1:]

        layer.self_attn.register_forward_hook(after)
    torch.testing.assert_close(output(model), output(own))
    model.add_adapter("b", BottleneckConfig(target_modules=["self_attn"]))
    with pytest.raises(UserError, match="only a layer of one input can serve several"):
        model(torch.arange(6).reshape(2, 3), adapter_names=["default", "b"])


def test_a_stack_with_lora_within_the_wrapped_block_and_rows_of_both() -> None:
    model = get_peft_model(build(llama), BottleneckConfig(style="parallel"), "a")
    randomize(model)
    model.add_adapter("b", LoraConfig(target_modules=["down_proj"]))
    model.set_adapter("b")
    randomize(model)
    rows = torch.arange(3, 23).reshape(2, 10)
    alone = []
    for name in ("a", "b"):
        model.set_adapter(name)
        alone.append(output(model))
    mixed = model(rows, adapter_names=["a", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]))
    model.set_adapter(["b", "a"])
    assert not torch.allclose(output(model), alone[0])
    with pytest.raises(UserError, match="'a' is a Bottleneck, which no weight can say"):
        model.merge_adapter()
    model.merge_adapter(["b"])
    torch.testing.assert_close(output(model), alone[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"style": "series"},
        {"non_linearity": "step"},
        {"reduction_factor": 0},
        {"scaling": float("nan")},
    ],
)
def test_a_value_that_cannot_be_is_refused(settings) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        BottleneckConfig(**settings)


def test_a_block_without_a_linear_layer_is_refused() -> None:
    config = BottleneckConfig(target_modules=["act_fn"])
    with pytest.raises(UserError, match="holds no linear layer"):
        get_peft_model(build(llama), config)
