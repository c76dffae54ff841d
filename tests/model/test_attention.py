"""Models on packed rows through the compiled attention, beside the same rows one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from inlay.kernels import attention as kernel
from inlay.model import attention as module
from inlay.model.attention import Packed, packed_attention, recognized

TAKE_PART = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"),
    "mixtral",
]
LENGTHS = (13, 1, 11)
KEPT = {"use_cache": False}


@pytest.fixture
def calls(monkeypatch):
    """The windows of the layers that ran through the kernel, and how often rows were looked for."""
    seen = {"windows": [], "looks": 0}
    compute, look = kernel.attention, module.recognized

    def attention(*args, **told):
        seen["windows"].append(told["window"])
        return compute(*args, **told)

    def recognized(*args):
        seen["looks"] += 1
        return look(*args)

    monkeypatch.setattr(kernel, "attention", attention)
    monkeypatch.setattr(module, "recognized", recognized)
    return seen


def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 39, (1, n), generator=generator) for n in LENGTHS]


def packed(parts):
    places = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    return {"input_ids": torch.cat(parts, 1), "position_ids": places, **KEPT}


def gradients(model, logits, targets):
    """Return the gradients of a loss over all tokens, whole or in parts."""
    model.zero_grad()
    total = sum(
        cross_entropy(a[0].float(), b[0], reduction="sum")
        for a, b in zip(logits, targets, strict=True)
    )
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, close, **how):
    """Compare logits and gradients of packed rows with those of rows one by one."""
    parts = rows()
    alone = [model(input_ids=part, **KEPT).logits for part in parts]
    expected = gradients(model, alone, parts)
    with packed_attention(model) as takes_part:
        assert takes_part
        together = model(**packed(parts)).logits
        found = gradients(model, together.split(LENGTHS, 1), parts)
    for one, other in zip(together.split(LENGTHS, 1), alone, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        largest = max(float(expected[name].abs().max()), 1e-3)
        torch.testing.assert_close(gradient / largest, expected[name] / largest, **close)


@pytest.mark.parametrize("name", TAKE_PART)
def test_packed_rows_are_those_computed_alone(name, architecture, calls):
    model = architecture(name)
    compare(model, {"rtol": 1e-5, "atol": 1e-5})
    assert len(calls["windows"]) == 2  # a layer once
    assert calls["looks"] <= 2  # once for each kind of mask, not for each layer


@pytest.mark.parametrize("name", TAKE_PART)
def test_in_half_precision_they_are_near(name, architecture, calls):
    compare(architecture(name).bfloat16(), {"rtol": 0.05, "atol": 0.05})
    assert calls["windows"]


@pytest.mark.parametrize("name", TAKE_PART)
def test_recomputed_activations_are_the_same(name, architecture, calls):
    model = architecture(name)
    for each in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        each.p = 0.0
    model.train()
    parts = rows()
    with packed_attention(model):
        plain = gradients(model, model(**packed(parts)).logits.split(LENGTHS, 1), parts)
        before = len(calls["windows"]), calls["looks"]
        model.activation_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, model(**packed(parts)).logits.split(LENGTHS, 1), parts)
    assert len(calls["windows"]) == 3 * before[0]  # once more for the backward pass
    assert calls["looks"] == 2 * before[1]
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


def test_each_layer_sees_as_far_as_its_mask_says(architecture, calls):
    wanted = {"llama": [None, None], "mistral": [8, 8], "gemma2": [8, None], "gpt2": [None, None]}
    for name, windows in wanted.items():
        calls["windows"].clear()
        model = architecture(name)
        with packed_attention(model), torch.no_grad():
            model(**packed(rows()))
        assert calls["windows"] == windows


@pytest.mark.parametrize("name", TAKE_PART)
def test_padded_and_cached_batches_compute_as_before(name, architecture, calls):
    model = architecture(name)
    ids = torch.cat(rows(), 1).view(5, 5)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 1, 2])[:, None]).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **KEPT).logits
        said = model.generate(ids[:2], max_new_tokens=4, do_sample=False, pad_token_id=0)
        with packed_attention(model):
            found = model(input_ids=ids, attention_mask=mask, **KEPT).logits
            assert not calls["windows"]
            again = model.generate(ids[:2], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    assert torch.equal(again, said)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_of_one_length_need_no_packing(name, architecture, calls):
    model = architecture(name)
    ids = torch.cat(rows(), 1).view(5, 5)
    with torch.no_grad():
        expected = model(input_ids=ids, **KEPT).logits
        with packed_attention(model):
            found = model(input_ids=ids, **KEPT).logits
    assert len(calls["windows"]) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TAKE_PART)
def test_a_mask_that_hides_nothing_is_none(name, architecture, calls):
    model = architecture(name)
    ids = torch.cat(rows(), 1).view(5, 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **KEPT}
    with torch.no_grad():
        expected = model(**given).logits
        with packed_attention(model):
            found = model(**given).logits
    assert len(calls["windows"]) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["falcon", "t5", "bert", "vit", "clip"])
def test_a_model_that_does_not_take_part_is_left_as_it_is(name, architecture, calls):
    from tests.model.conftest import output

    model = architecture(name)
    expected = output(model, name)
    with packed_attention(model):
        assert torch.equal(output(model, name), expected)
    # an encoder that asks ours for a mask is given the model's own
    assert not calls["windows"] or name == "clip"


def test_dropout_weights_and_scores_that_are_asked_for_come_from_the_model(architecture, calls):
    model = architecture("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    given = packed(rows())
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(**given).logits
        with packed_attention(model):
            torch.manual_seed(1)
            assert torch.equal(model(**given).logits, expected)
            assert not calls["windows"]
    eager = architecture("gemma2")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**given, output_attentions=True).attentions
        with packed_attention(eager):
            found = eager(**given, output_attentions=True).attentions
    assert not calls["windows"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attention_with_sinks_computes_as_before(calls):
    from transformers import GptOssConfig, GptOssForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**small, **heads, **experts)).float().eval()
    with torch.no_grad():
        expected = model(**packed(rows())).logits
        with packed_attention(model) as takes_part:
            assert takes_part
            assert torch.equal(model(**packed(rows())).logits, expected)
    assert not calls["windows"]


def test_autocast_gives_what_it_gives_the_models_own(architecture, calls):
    model = architecture("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**packed(rows())).logits
        with packed_attention(model):
            found = model(**packed(rows())).logits
    assert len(calls["windows"]) == 2
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_afterwards_nothing_is_left(architecture):
    for name in ("llama", "gemma2", "clip"):
        model = architecture(name)
        configs = [m.config for m in model.modules() if hasattr(m, "config")]
        before = [config._attn_implementation for config in configs]
        with pytest.raises(KeyError), packed_attention(model):
            raise KeyError
        assert [config._attn_implementation for config in configs] == before


def test_an_attention_that_was_set_meanwhile_stays(architecture):
    model = architecture("llama")
    with packed_attention(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_only_rows_up_to_each_token_are_recognized():
    row = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])

    def causal(b, h, q, k):
        return (k <= q) & (row[b, q] == row[b, k])

    def near(b, h, q, k):
        return causal(b, h, q, k) & (k > q - 3)

    def chunked(b, h, q, k):
        return causal(b, h, q, k) & (k // 3 == q // 3)

    def all_of_it(b, h, q, k):
        return row[b, q] == row[b, k]

    def prefix(b, h, q, k):
        return causal(b, h, q, k) | (k == q + 1) & (q == 0)

    def gone(b, h, q, k):
        return causal(b, h, q, k) & (q > 0)

    found = recognized(causal, (2, 5), "cpu")
    assert found is not None
    assert found.bounds == (0, 3, 5, 6, 10)
    windowed = recognized(near, (2, 5), "cpu", 3)
    assert windowed is not None
    assert windowed.bounds == found.bounds
    assert recognized(near, (2, 5), "cpu") is None
    pieces = recognized(chunked, (2, 5), "cpu", 3)
    assert pieces is not None
    assert pieces.bounds == (0, 3, 5, 6, 8, 10)  # chunks are rows too
    for other, window in ((near, 2), (all_of_it, None), (prefix, None), (gone, None)):
        assert recognized(other, (2, 5), "cpu", window) is None


def test_the_mask_that_is_stood_for_is_made_once():
    made = []
    stands = Packed(kernel.Rows.of([2]), None, lambda: made.append(1))
    assert stands.mask() is stands.mask()
    assert made == [1]
