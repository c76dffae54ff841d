"""LoRA's variants where the settings of `settings/lora.py` cannot say what is tried."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.bases import view
from inlay.checkpoint.export import export_model
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.selection import Selection
from inlay.methods import method
from inlay.methods.lora import LoraConfig
from inlay.model.ranks import penalties
from inlay.train.factors import is_second
from tests.laws.samples import Mixture
from tests.methods.bases import bert, build, llama, output, randomize

# PEFT's, of a name in transformers that will go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def made(layer: nn.Module, path: str = "", **settings: Any) -> Any:
    config, base = LoraConfig(**settings), view(layer)
    base.path = path
    kind = method("lora").of(config)
    assert kind is not None
    adapter = kind(config, base)
    adapter.reset(base)
    return adapter


def randomized(adapter: Any) -> Any:
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def test_qalora_computes_what_peft_does_over_gptq_layers_where_alone_it_has_it():
    variants = pytest.importorskip("peft.tuners.lora.variants")
    layer, x = nn.Linear(12, 5), torch.randn(2, 3, 12)
    adapter = randomized(made(layer, use_qalora=True, qalora_group_size=4, r=2, lora_alpha=3))
    theirs = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=adapter.lora_A)},
        lora_B={"a": SimpleNamespace(weight=adapter.lora_B)},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 1.5},
        qalora_group_size={"a": 4},
        training=False,
        in_features=12,
    )
    expected = variants.QALoraLinearVariant.forward(theirs, "a", x, layer(x))
    torch.testing.assert_close(adapter(view(layer), x), expected)
    with pytest.raises(UserError, match=r"qalora_group_size=5 does not divide the 12 .* try 4"):
        made(layer, use_qalora=True, qalora_group_size=5)


def test_the_update_of_qalora_is_the_same_for_all_inputs_of_a_group():
    delta = randomized(made(nn.Linear(12, 5), use_qalora=True, qalora_group_size=4)).delta(
        torch.float32
    )
    groups = delta.unflatten(1, (3, 4))
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))


def test_a_bias_merged_into_a_layer_without_one_is_taken_out_again():
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    host = Inlaid(view(layer), Selection(("a",)))
    host.adapters["a"] = randomized(made(layer, lora_bias=True))
    expected = host(x)
    host.merge(("a",))
    torch.testing.assert_close(layer(x), expected)
    host.unmerge()
    assert layer.bias is None


def test_a_model_with_biases_that_its_class_lacks_is_not_exported(tmp_path):
    config = LoraConfig(r=2, lora_bias=True, init_lora_weights=False)
    merged = inlay.get_peft_model(build(llama), config).merge_and_unload()
    with pytest.raises(UserError, match=r"gave 4 layers a bias, .*LlamaForCausalLM has no place"):
        export_model(merged, None, tmp_path / "llama")
    merged = inlay.get_peft_model(build(bert), config).merge_and_unload()
    export_model(merged, None, tmp_path / "bert")


def test_bdlora_counts_a_module_by_any_part_of_its_path_and_refuses_what_is_in_neither_list():
    where = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down"], "nblocks": 2}
    sizes = {}
    for path in ("layers.0.q_proj", "layers.0.mlp.down_proj"):
        adapter = made(nn.Linear(8, 6), path, use_bdlora=where, r=4)
        sizes[path] = tuple(adapter.lora_A.shape), tuple(adapter.lora_B.shape)
    assert list(sizes.values()) == [((4, 4), (6, 4)), ((4, 8), (6, 2))]
    with pytest.raises(UserError, match=r"'layers\.0\.up' is in neither of target_modules_bd_a"):
        made(nn.Linear(8, 6), "layers.0.up", use_bdlora=where)
    with pytest.raises(UserError, match="nblocks=2 does not divide the 3"):
        made(nn.Linear(8, 6), "q_proj", use_bdlora=where, r=3)
    whole = made(nn.Linear(8, 6), "up", use_bdlora={**where, "match_strict": False}, r=3)
    assert tuple(whole.lora_A.shape) == (3, 8)


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"use_qalora": True}], ids=["lora_bias", "use_qalora"]
)
def test_what_is_no_plain_lora_is_not_combined_as_one(settings):
    model = inlay.get_peft_model(build(llama), LoraConfig(**settings))
    model.add_adapter("b", LoraConfig())
    with pytest.raises(UserError, match="default"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", "linear")


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def test_a_tied_head_takes_the_gradients_of_its_embeddings_adapter():
    config = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    model = inlay.get_peft_model(build(tied_llama), config)
    randomize(model)
    ids = torch.arange(3, 23).reshape(2, 10)
    logits = model(input_ids=ids).logits
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
    assert merged.lm_head.weight.equal(merged.model.embed_tokens.weight)
    logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 2
    assert all("embed_tokens" in name and g.abs().sum() > 0 for name, g in grads.items())


def test_rows_of_tokens_train_beside_a_lora_and_leave_with_it():
    base = build(tied_llama)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    plain = output(base)
    model = inlay.get_peft_model(base, LoraConfig(r=2, trainable_token_indices=[3, 5]))
    randomize(model)
    assert not torch.allclose(output(model), plain)
    assert torch.equal(model.unload().state_dict()["lm_head.weight"], before["lm_head.weight"])
    torch.testing.assert_close(output(base), plain)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices: .* names a token twice"),
        ({"trainable_token_indices": [99]}, "token_indices names 99, and the layer has the ids 0"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "called. Did you mean .embed_tokens"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "is in trainable_token_indices, and in target_modules or modules_to_save",
        ),
        (
            {
                "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]},
                "ensure_weight_tying": True,
            },
            "'lm_head' is adapted otherwise than the embedding",
        ),
        ({"ensure_weight_tying": True}, "none of model.embed_tokens, lm_head is adapted"),
        ({"ensure_weight_tying": True, "use_dora": True}, "goes with a plain LoRA, not with use_d"),
    ],
)
def test_what_tokens_and_ties_cannot_be_is_refused_and_changes_nothing(settings, says):
    model = build(tied_llama)
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=says):
        inlay.get_peft_model(model, LoraConfig(**settings))
    assert dict(model.named_modules()) == modules


def test_a_file_whose_tied_head_says_otherwise_than_its_embedding_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    inlay.get_peft_model(build(tied_llama), config).save_pretrained(tmp_path)
    (tmp_path / "inlay.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'lm_head' is tied to the embedding, but the file has"):
        inlay.PeftModel.from_pretrained(build(tied_llama), tmp_path)


def mixture() -> Any:
    model = nn.Sequential(Mixture(), nn.Linear(5, 5, bias=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_several_parameters_of_one_module_have_ranks_of_their_own_and_leave_the_base_as_it_was():
    model, x = mixture(), torch.randn(2, 6)
    before, plain = {n: p.clone() for n, p in model.named_parameters()}, model(x)
    config = LoraConfig(
        r=2, target_parameters=["experts", "0.router", "1.weight"], rank_pattern={"experts": 1}
    )
    adapted = inlay.get_peft_model(model, config)
    torch.testing.assert_close(adapted(x), plain)
    shapes = {
        n.rpartition(".")[2]: tuple(p.shape) for n, p in adapted.named_parameters() if "lora" in n
    }
    assert shapes == {
        "router_lora_A": (2, 6),
        "router_lora_B": (3, 2),
        "experts_lora_A": (3, 6),
        "experts_lora_B": (5, 3),
        "lora_A": (2, 5),
        "lora_B": (5, 2),
    }
    assert {name for name in shapes if is_second(name)} == {n for n in shapes if n.endswith("B")}
    randomize(adapted)
    out = adapted(x)
    assert not torch.allclose(out, plain)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), out)
    adapted.unmerge_adapter()
    adapted.unload()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_parameters_alone_are_adapted_where_no_modules_are_named():
    for more in ({}, {"target_modules": []}):
        model = inlay.get_peft_model(mixture(), LoraConfig(target_parameters=["router"], **more))
        assert list(model.roster.hosts) == ["0"]


def test_rows_with_tied_layers_and_without_compute_in_one_batch_what_they_do_alone():
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = inlay.get_peft_model(build(tied_llama), config).eval()
    model.add_adapter("tokens", LoraConfig(r=2, trainable_token_indices=[4, 5]))
    model.set_adapter("tokens")
    randomize(model)
    model.set_adapter("default")
    randomize(model)
    ids = torch.arange(3, 13).expand(3, -1)
    names = ["tokens", "default", "__base__"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    alone = [build(tied_llama)(input_ids=ids[:1]).logits]
    for name in ("default", "tokens"):
        model.set_adapter(name)
        alone.insert(0, model(input_ids=ids[:1]).logits)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_parameters": ["expert"]}, "called. Did you mean .experts"),
        ({"target_parameters": ["0.bias"]}, r"'0.bias' is a \[5\] of a Mixture"),
        ({"target_parameters": ["experts"], "lora_dropout": 0.1}, "alone, not with lora_dropout"),
        ({"target_parameters": ["experts"], "use_dora": True}, "alone, not with use_dora"),
        (
            {"target_parameters": ["1.weight"], "target_modules": ["1"]},
            "'1' is in target_modules and '1.weight' in target_parameters too",
        ),
        (
            {"target_parameters": ["experts"], "rank_pattern": {"expert": 1}},
            "rank_pattern names 'expert', which is the end of no adapted",
        ),
    ],
)
def test_what_raw_parameters_cannot_be_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        inlay.get_peft_model(mixture(), LoraConfig(**settings))


def test_kasa_leaves_out_the_smallest_singular_values_and_the_base_as_it_is():
    layer = nn.Linear(6, 5)
    before, base = layer.weight.clone(), view(layer)
    adapter = made(layer, kasa_config={}, r=2)
    u, s, v = torch.linalg.svd(before)
    kept = u[:, :3] * s[:3] @ v[:3]
    torch.testing.assert_close(adapter.reweight(layer.weight, None)[0], kept)
    assert torch.equal(layer.weight, before)
    x = torch.randn(4, 6)
    dropping = made(layer, kasa_config={}, r=2, lora_dropout=0.5).train()
    torch.testing.assert_close(dropping(base, x), x @ kept.T + layer.bias)  # B is zero yet
    with pytest.raises(UserError, match=r"takes 5 singular values off a weight .* r=4 at most"):
        made(layer, kasa_config={}, r=5)


def test_kasas_loss_is_pefts_and_is_added_to_a_models_in_training(tmp_path):
    peft = pytest.importorskip("peft")
    told = {"beta": 0.5, "gamma": 0.25}
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(r=2, kasa_config=told))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True)
    ids = torch.arange(3, 13)[None]
    plain = ours.eval()(input_ids=ids, labels=ids).loss
    added = ours.train()(input_ids=ids, labels=ids).loss - plain
    torch.testing.assert_close(added, theirs.base_model._get_kasa_loss())
    terms = [term().detach() for term in penalties(ours.roster)]
    torch.testing.assert_close(torch.stack(terms).sum(), added.detach())
