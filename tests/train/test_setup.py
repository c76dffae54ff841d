"""What is switched on for a run, and off again after it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from inlay import LoraConfig, get_peft_model
from inlay.core.errors import UserError
from inlay.objectives.classify import Classify
from inlay.objectives.sft import Sft
from inlay.train import setup
from inlay.train.settings import TrainConfig
from inlay.train.setup import choose_packing, require_isolation, trainable, training_mode
from tests.data.tiny_models import build

CHECKPOINTING = TrainConfig(gradient_checkpointing=True)


def gradients(model, config):
    """Return the gradients of one pass with dropout, the embeddings frozen as under an adapter."""
    ids = torch.arange(5, 25).reshape(2, 10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    with training_mode(model, config), torch.random.fork_rng():
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in trainable(model).items()}


def test_a_transformers_model_computes_again_with_the_same_gradients_and_is_left_as_it_was(
    tiny_llama,
):
    settings = {"attention_dropout": 0.3, "attn_implementation": "eager"}
    plain = gradients(tiny_llama(**settings), TrainConfig())
    model = tiny_llama(**settings)
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model, CHECKPOINTING), plain, rtol=0, atol=0)
    assert len(calls) == 2, "the layer was not computed again"
    hook.remove()
    assert not model.training
    assert not model.is_activation_checkpointing
    assert not model.get_input_embeddings()._forward_hooks


def test_below_the_lowest_adapted_layer_nothing_is_computed_again(tiny_llama):
    config = LoraConfig(r=2, layers_to_transform=[1], layers_pattern="layers")
    model = get_peft_model(tiny_llama(), config)
    calls: list[int] = []
    for i, layer in enumerate(model.get_base_model().model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    ids = torch.arange(5, 25).reshape(2, 10)
    with training_mode(model, CHECKPOINTING):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert calls == [0, 1, 1]


def test_a_model_that_checkpoints_already_still_does_afterwards(tiny_llama):
    model = tiny_llama()
    model.activation_checkpointing_enable()
    with training_mode(model, CHECKPOINTING):
        pass
    assert model.is_activation_checkpointing


def test_a_model_that_cannot_says_so():
    with (
        pytest.raises(UserError, match="Linear cannot checkpoint"),
        training_mode(torch.nn.Linear(1, 1), CHECKPOINTING),
    ):
        pass


def test_the_hosts_selection_is_kept_for_the_computation_again(tiny_llama):
    from inlay.core.inlaid import Inlaid

    model = tiny_llama()
    given = {}
    model.activation_checkpointing_enable = given.update
    hosts = [module for module in model.modules() if isinstance(module, Inlaid)]
    assert not hosts
    with training_mode(model, CHECKPOINTING):
        assert given.keys() == {"use_reentrant", "context_fn"}
        assert not given["use_reentrant"]
        # the model may get adapters while it checkpoints
        adapted = get_peft_model(model, LoraConfig(r=2))
        _, again = given["context_fn"]()
        with adapted.disable_adapter(), again:
            assert adapted.roster.selection.active == ("default",)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("falcon", {}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    ],
)
def test_packing_is_refused_where_trying_it_shows_that_rows_see_each_other(kind, settings):
    with pytest.raises(UserError, match=r"packed rows see each other .*set packing: false"):
        require_isolation(build(kind, "eager", **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma3_text", "gpt2"])
def test_packing_is_taken_where_rows_do_not(kind, dtype):
    model = build(kind, "eager").to(dtype).train()
    require_isolation(model)
    assert model.training


def test_packing_is_refused_for_a_real_model_that_carries_a_state():
    with pytest.raises(UserError, match="carry a state over packed rows"):
        require_isolation(build("mamba", "eager", state_size=4))


def test_packing_is_refused_where_a_model_takes_no_positions():
    class Unplaced(torch.nn.Module):
        config = None

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, use_cache=None):
            return self.embed(input_ids)

    model = Unplaced()
    model.embed = torch.nn.Embedding(9, 4)
    with pytest.raises(UserError, match="Unplaced takes no position_ids"):
        require_isolation(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_rows_are_packed_where_nothing_is_said_and_the_model_keeps_them_apart(kind):
    found, padded = choose_packing(build(kind, "eager"), Sft(), TrainConfig())
    assert (found, padded) == (Sft(packing=True), None)


def test_what_is_said_of_packing_is_done():
    for given in (True, False):
        asked = Sft(packing=given)
        found = choose_packing(build("llama", "eager"), asked, TrainConfig(packing=given))
        assert found == (asked, None)
    assert choose_packing(build("llama", "eager"), Sft(), TrainConfig(fast=False)) == (Sft(), None)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "packed rows see each other"),
        ("mamba", {"state_size": 4}, "carry a state over packed rows"),
    ],
)
def test_rows_are_padded_where_the_model_joins_them_and_why_is_told(kind, settings, told):
    found, padded = choose_packing(build(kind, "eager", **settings), Sft(), TrainConfig())
    assert found == Sft()
    assert told in padded
    assert "set packing" not in padded


def test_rows_are_padded_where_attention_would_compare_all_of_them(monkeypatch):
    monkeypatch.setattr(setup, "packed_attention", lambda model: nullcontext(False))
    model = build("llama", "eager")
    found, padded = choose_packing(model, Sft(), TrainConfig())
    assert found == Sft()
    assert "compare each token with those of all packed rows" in padded
    model.config._attn_implementation = "flash_attention_2"
    assert setup._varlen(model)


def test_a_model_that_cannot_be_tried_trains_padded():
    found, padded = choose_packing(torch.nn.Linear(1, 1), Sft(), TrainConfig())
    assert found == Sft()
    assert "trying it failed with AttributeError" in padded


def test_what_has_one_result_for_a_row_is_as_it_was_without_a_word():
    assert choose_packing(build("llama", "eager"), Classify(), TrainConfig()) == (Classify(), None)
