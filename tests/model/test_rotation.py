"""Attention blocks that rotate inside the attention, beside the blocks as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from inlay.kernels import attention as kernel
from inlay.model import rotation
from inlay.model.attention import packed_attention
from inlay.model.fast import fast_paths, inference
from inlay.model.rotation import Rotating, rotating_attention

TAKE_PART = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral"]
"""Of gpt_neox a part is rotated, gpt2 has no rotation."""
OTHERS = ["interleaved", "gpt_neox", "gpt2"]
LENGTHS = (13, 1, 11)


@pytest.fixture
def turned(monkeypatch):
    """Whether each call of the attention was to rotate."""
    seen = []
    compute = kernel.attention

    def attention(*args, **told):
        seen.append(told.get("rotation") is not None)
        return compute(*args, **told)

    monkeypatch.setattr(kernel, "attention", attention)
    return seen


def interleaved():
    """A random model that rotates neighbors, not halves."""
    config = CohereConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CohereForCausalLM(config).eval()


def batch(rows=1):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 39, (rows, sum(LENGTHS)), generator=generator)
    places = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    return {"input_ids": ids, "position_ids": places, "use_cache": False}


def results(model, given):
    """Return the logits and the gradients of all parameters."""
    model.zero_grad()
    logits = model(**given).logits
    (logits.float().log_softmax(-1)[..., 5].sum() / 10).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def compare(model, given, turned, *, close, takes_part=True):
    def run():
        with torch.no_grad():
            model(**given)

    with packed_attention(model):
        expected = results(model, given)
        with rotating_attention(model, run) as blocks:
            del turned[:]
            found = results(model, given)
    assert bool(blocks) == takes_part
    assert turned == [takes_part] * 2
    assert found.keys() == expected.keys()
    for name, one in found.items():
        apart = (one - expected[name]).float().norm() / (expected[name].float().norm() + 1e-4)
        assert apart < close, name


@pytest.mark.parametrize("name", TAKE_PART)
def test_blocks_that_rotate_inside_compute_what_they_did(name, architecture, turned):
    compare(architecture(name), batch(), turned, close=1e-5)


@pytest.mark.parametrize("name", TAKE_PART)
def test_in_half_precision_they_are_near(name, architecture, turned):
    compare(architecture(name).bfloat16(), batch(), turned, close=0.05)


def test_rows_of_a_batch_have_places_of_their_own(architecture, turned):
    given = batch(2)
    given["position_ids"] = torch.stack([torch.arange(25), torch.arange(25) + 4])
    compare(architecture("llama"), given, turned, close=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_another_rotation_is_not_taken_for_it(name, dtype, architecture, turned):
    model = interleaved() if name == "interleaved" else architecture(name)
    compare(model.to(dtype), batch(), turned, close=1e-5, takes_part=False)


def test_dropout_on_the_weights_leaves_a_block_as_it_is(architecture, turned):
    model = architecture("llama")
    model.eval()  # as the pass that shows what layers are fed
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    compare(model, batch(), turned, close=1e-5, takes_part=False)


class Sinking(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, s_aux=torch.zeros(2))


def test_what_wants_more_than_scores_is_left_as_it_is(architecture, turned):
    model = architecture("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Sinking  # of which torch's attention takes no notice

    def run():
        with torch.no_grad():
            model(**batch())

    with packed_attention(model), rotating_attention(model, run) as blocks:
        assert not blocks
        del turned[:]
        results(model, batch())
    assert not turned


def test_a_model_under_the_compiler_takes_the_plain_blocks(architecture, turned, monkeypatch):
    model = architecture("llama")

    def run():
        with torch.no_grad():
            model(**batch())

    with packed_attention(model), rotating_attention(model, run) as blocks:
        assert blocks
        compiling = SimpleNamespace(compiler=SimpleNamespace(is_compiling=lambda: True))
        monkeypatch.setattr(rotation, "torch", compiling)  # not for transformers, which would ask
        del turned[:]
        model(**batch())
    assert turned == [False] * 2


def test_with_past_keys_a_block_computes_by_its_own(architecture, turned):
    model = architecture("llama").eval()
    ids = batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)

    def run():
        with torch.no_grad():
            model(**batch())

    with packed_attention(model), rotating_attention(model, run) as blocks:
        del turned[:]
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert blocks
    assert not any(turned)
    assert found.tolist() == expected.tolist()


def test_the_blocks_are_put_back(architecture):
    model = architecture("llama")

    def run():
        with torch.no_grad():
            model(**batch())

    with packed_attention(model), rotating_attention(model, run) as blocks:
        assert all(isinstance(block.forward, Rotating) for block in blocks)
    assert not any("forward" in vars(module) for module in model.modules())


def test_recomputed_under_checkpointing_they_are_the_same(architecture, turned):
    model = architecture("llama").train()

    def run():
        with torch.no_grad(), inference(model):
            model(**batch())

    with packed_attention(model), rotating_attention(model, run) as blocks:
        expected = results(model, batch())
        model.activation_checkpointing_enable({"use_reentrant": False})
        del turned[:]
        found = results(model, batch())
    assert blocks
    assert turned == [True] * 4  # once more for the backward pass
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-6)


def test_the_fast_paths_of_a_model_have_them(architecture):
    model = architecture("qwen3")
    with fast_paths(model, lambda: model(**batch())) as (blocks, attention):
        assert attention
        assert sum(isinstance(block.forward, Rotating) for block in blocks) == 2
