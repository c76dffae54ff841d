"""LLaMA-Adapter on whole models: where PEFT is not right, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay import AdaptionPromptConfig, LoraConfig, UserError, get_peft_model
from tests.methods.bases import bert, build, gpt2, llama, output, randomize


def test_an_output_projection_with_a_bias_adds_it_once() -> None:
    base = build(lambda: llama(attention_bias=True))
    plain = output(base)
    model = get_peft_model(base, AdaptionPromptConfig(adapter_layers=2)).eval()
    torch.testing.assert_close(output(model), plain, rtol=0, atol=0)


def test_heads_may_be_wider_than_the_model() -> None:
    base = build(lambda: llama(head_dim=12))
    model = get_peft_model(base, AdaptionPromptConfig(adapter_len=3, adapter_layers=1)).eval()
    randomize(model)
    attention = model.roster.hosts["model.layers.1.self_attn"]
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen.update(kwargs, out=out[0])

    with torch.no_grad(), model.disable_adapter():
        attention.register_forward_hook(look, with_kwargs=True)
        output(model)
        below = seen["out"]
    with torch.no_grad():
        output(model)
    own: Any = attention.base_layer
    held: Any = attention.adapters["default"]
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    with torch.no_grad():
        k, v = (p(held.adaption_prompt[0]).unflatten(-1, (2, 12)) for p in (own.k_proj, own.v_proj))
        q = own.q_proj(x).unflatten(-1, (4, 12))
        turned = torch.cat([-q[..., 6:], q[..., :6]], -1)
        q = q * cos[:, :, None] + turned * sin[:, :, None]
        heads = [
            (q[:, :, h] @ k[:, h // 2].T / 12**0.5).softmax(-1) @ v[:, h // 2] for h in range(4)
        ]
        share = own.o_proj(torch.cat(heads, -1)) * held.adaption_gate
    assert share.abs().max() > 1e-3
    torch.testing.assert_close(seen["out"], below + share)


def test_the_usual_layers_are_all_but_the_two_lowest() -> None:
    base = build(lambda: llama(num_hidden_layers=4))
    model = get_peft_model(base, AdaptionPromptConfig())
    config = model.peft_config["default"]
    assert sorted(model.roster.hosts) == [f"model.layers.{i}.self_attn" for i in (2, 3)]
    assert (config.target_modules, config.adapter_len, config.adapter_layers) == (
        "self_attn",
        10,
        2,
    )


def test_it_stands_over_a_lora_in_the_same_attention_and_generates_with_a_cache() -> None:
    base = build(llama)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("prompts", AdaptionPromptConfig(adapter_len=3, adapter_layers=2))
    randomize(model, 0.5)
    model.set_adapter(["default", "prompts"])
    randomize(model.eval(), 0.5)
    ids = torch.arange(3, 23).reshape(2, 10)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(input_ids=ids, **kwargs)
    assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **kwargs))


@pytest.mark.parametrize(
    ("make", "settings", "reason"),
    [
        (bert, {}, "model_type 'bert' has an attention that ADAPTION_PROMPT does not know"),
        (bert, {"target_modules": "attention"}, "BertAttention is no attention that"),
        (llama, {"adapter_layers": 3}, "adapter_layers=3, but 2 modules of this model are called"),
        (llama, {"target_modules": "mlp"}, "LlamaMLP is no attention that ADAPTION_PROMPT knows"),
        (llama, {"target_modules": ["self_attn", "mlp"]}, "must be one name"),
        (gpt2, {"adapter_len": 0}, "adapter_len=0 must be a whole number from 1"),
        (gpt2, {"layers_to_transform": [1]}, "layers_to_transform=.* is not supported"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        get_peft_model(build(make), AdaptionPromptConfig(**settings))
