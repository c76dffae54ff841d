"""A model computes the same by what `inlay.fast` puts on it, whatever is done to it meanwhile."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay import LoraConfig, UserError, get_peft_model
from inlay.core.inlaid import Inlaid
from inlay.model.accelerate import by_nodes
from inlay.surface.fast import fast
from tests.methods.bases import build, llama, randomize
from tests.model.conftest import ARCHITECTURES, inputs

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def base(name: str) -> Any:
    import transformers

    config_class, model_class, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    return made.float()


def adapted(make: Callable[[], Any] = llama, **given: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(build(make), LoraConfig(r=3, target_modules="all-linear", **given))
    randomize(model, 0.2)
    return model


def results(model: Any, **batch: Any) -> list[torch.Tensor]:
    """Return what the model gives first, and the gradient of every trained parameter."""
    torch.manual_seed(7)
    batch = batch or {"input_ids": IDS}
    out = model(**batch)
    found = out.logits_per_image if hasattr(out, "logits_per_image") else out.logits
    (found * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [found.detach(), *grads]


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor], near: float = 1e-4) -> None:
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        assert float((a - b).norm()) <= near * (float(b.norm()) + 0.1)


@pytest.fixture
def model() -> Any:
    return adapted().train()


def plain(model: Any, **batch: Any) -> list[torch.Tensor]:
    """Return the results of `model` as it is now, but for its fast paths."""
    hosts = {m: m.fast for m in model.modules() if isinstance(m, Inlaid)}
    forms = {m: vars(m).pop("forward") for m in model.modules() if "forward" in vars(m)}
    for host in hosts:
        host.fast = None
    try:
        return results(model, **batch)
    finally:
        for host, path in hosts.items():
            host.fast = path
        for module, form in forms.items():
            module.forward = form


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_what_it_did(name: str) -> None:
    model = get_peft_model(base(name), LoraConfig(r=2, target_modules="all-linear")).train()
    randomize(model, 0.2)
    wanted = results(model, **inputs(name))
    with fast(model, inputs(name)) as paths:
        assert paths.layers
        assert_same(results(model, **inputs(name)), wanted)
    assert not paths.layers
    assert_same(results(model, **inputs(name)), wanted, near=0)


def test_a_model_of_transformers_needs_no_example(model: Any) -> None:
    with fast(model) as paths:
        assert len(paths.layers) == 2 * 7
        kinds = Counter(type(block).__name__ for block in paths.blocks)
        assert kinds["LlamaRMSNorm"] == 2 * 2 + 1
        assert kinds["LlamaMLP"] == 2
        assert paths.attention
        assert repr(paths) == (
            f"FastPaths(14 of 14 adapted layers, {len(paths.blocks)} blocks, attention: True)"
        )
    assert "0 of 14" in repr(paths)


def test_half_precision_by_autocast(model: Any) -> None:
    exact = results(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = results(model)
        with fast(model):
            found = results(model)

    def wrong(some: list[torch.Tensor]) -> float:
        pairs = zip(some, exact, strict=True)
        return sum(float((a - b).norm() / b.norm()) for a, b in pairs) / len(some)

    # each is as far from float32 as the other, up to chance
    assert found[0].dtype == wanted[0].dtype
    assert 0 < wrong(found) < 2 * wrong(wanted) < 0.2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_base(kind: str) -> None:
    packed, _ = inlay.load_base(quantize=kind, dtype=torch.float32)
    model = get_peft_model(packed, LoraConfig(r=2, target_modules="all-linear"))
    randomize(model, 0.1)
    wanted = results(model)
    with fast(model) as paths:
        assert paths.layers
        assert_same(results(model), wanted, near=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_generates_what_it_did(model: Any, mode: Any) -> None:
    model.eval()
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with mode():
        wanted, logits = model.generate(input_ids=IDS, **given), model(input_ids=IDS).logits
        with fast(model):
            assert torch.equal(model.generate(input_ids=IDS, **given), wanted)
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(model: Any, reentrant: bool) -> None:
    wanted = results(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with fast(model):
        assert_same(results(model), wanted)


def test_a_compiled_model_is_compiled_as_it_was(model: Any) -> None:
    """The compiler looks into the plain layers."""
    wanted = results(model)
    with fast(model):
        found = results(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    assert_same(found, wanted, near=1e-6)


# -- while it is on, adapters come and go


def test_another_adapter_is_fast_too(model: Any) -> None:
    with fast(model) as paths:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
        randomize(model, 0.2)
        model.set_adapter("other")
        assert len(paths.layers) == 2 * 3
        assert_same(results(model), plain(model))
        model.set_adapter("default")
        assert len(paths.layers) == 2 * 7
        assert_same(results(model), plain(model))


def test_an_adapter_of_the_same_name_takes_the_place_of_one_that_was_deleted(model: Any) -> None:
    model.add_adapter("kept", LoraConfig(r=2, target_modules="all-linear"))
    with fast(model) as paths:
        results(model)
        model.delete_adapter("default")
        model.add_adapter("default", LoraConfig(r=5, target_modules=["k_proj", "down_proj"]))
        model.set_adapter("default")
        randomize(model, 0.2)
        assert len(paths.layers) == 2 * 2
        assert_same(results(model), plain(model))


def test_layers_that_get_their_first_adapter_meanwhile() -> None:
    """A gated MLP asks for its linears at each call."""
    model = get_peft_model(build(llama), LoraConfig(r=2, target_modules=["q_proj"])).train()
    with fast(model):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["gate_proj", "down_proj"]))
        model.set_adapter("other")
        randomize(model, 0.2)
        found = results(model)
        assert_same(found, plain(model))
        assert len(found) == 1 + 2 * 2 * 2


def test_stacks_rows_and_the_base_alone(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2))
    model.set_adapter(["default", "other"])  # so that both have gradients
    randomize(model, 0.2)
    rows = {"input_ids": IDS, "adapter_names": ["other", "__base__"]}
    with fast(model) as paths:
        assert_same(results(model, **rows), plain(model, **rows))
        with model.disable_adapter(), torch.no_grad():
            assert not paths.layers
            bare = model(input_ids=IDS).logits
        assert_same(results(model), plain(model))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(bare, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_and_unmerging(dora: bool) -> None:
    """Also where it was put on while an adapter was merged."""
    model = adapted(use_dora=dora).eval()
    wanted = results(model)
    model.merge_adapter()
    with fast(model) as paths, torch.no_grad():
        assert not paths.layers
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted[0], rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
        assert len(paths.layers) == 2 * 7
        with torch.enable_grad():
            assert_same(results(model), wanted)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
def test_taking_all_adapters_out(model: Any, merged: bool) -> None:
    model.eval()
    with fast(model) as paths, torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with model.disable_adapter():
            bare = model(input_ids=IDS).logits
        out = model.merge_and_unload() if merged else model.unload()
        found = out(input_ids=IDS).logits
        torch.testing.assert_close(found, wanted if merged else bare, rtol=1e-3, atol=1e-3)
        assert not paths.layers
    assert not any("forward" in vars(module) for module in out.modules())


# -- and so does what stands below and beside them


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_train_or_change(dora: bool) -> None:
    model = adapted(use_dora=dora).train()
    layers = model.get_base_model().model.layers
    with fast(model) as paths:
        results(model)
        layers[0].self_attn.q_proj.base_layer.weight.requires_grad = True
        layers[1].post_attention_layernorm.weight.requires_grad = True
        found = results(model)
        assert len(paths.layers) == 2 * 7 - 1
        assert_same(found, plain(model))
        with torch.no_grad():
            layers[1].mlp.up_proj.base_layer.weight.mul_(3)
        assert_same(results(model), plain(model))
        model.double()
        assert_same(results(model), plain(model))


def test_hooks_hear_what_they_heard(model: Any) -> None:
    layer = model.get_base_model().model.layers[0]
    watched = [
        *(layer.self_attn.k_proj, layer.self_attn.k_proj.base_layer),
        *(layer.mlp, layer.mlp.act_fn, layer.mlp.up_proj, layer.input_layernorm),
    ]
    heard: list[nn.Module] = []
    for module in watched:
        module.register_forward_hook(lambda m, *_: heard.append(m))
    with fast(model):
        results(model)
    assert set(heard) == set(watched)


def test_a_hook_may_write_to_what_it_hears(model: Any) -> None:
    layer = model.get_base_model().model.layers[0]
    layer.post_attention_layernorm.register_forward_hook(lambda _m, _a, out: out.mul_(2))
    with fast(model):
        assert_same(results(model), plain(model))


def test_a_copy_has_paths_of_its_own(model: Any) -> None:
    with fast(model):
        other = copy.deepcopy(model)
        wanted = results(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert_same(results(other), wanted)
        assert_same(results(other), plain(other))


def test_a_gradient_of_a_gradient_is_refused(model: Any) -> None:
    with fast(model):
        out = model(**BATCH).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out, trained, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            sum(g.square().sum() for g in grads).backward()


# -- what a user may get wrong


def test_they_stay_on_where_nobody_keeps_what_was_returned_and_go_with_the_model() -> None:
    model = adapted()
    fast(model)
    gc.collect()
    assert by_nodes(model)
    assert any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation != "sdpa"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_second_time_is_refused_and_removing_is_not(model: Any) -> None:
    paths = fast(model)
    with pytest.raises(UserError, match=r"by fast paths already: remove\(\) those first"):
        fast(model)
    assert paths.layers
    paths.remove()
    paths.remove()
    fast(model).remove()


def test_without_an_example_to_go_by() -> None:
    with pytest.raises(UserError, match=r"Linear has no example inputs.*fast\(model, batch\)"):
        fast(nn.Linear(2, 2))
    image = get_peft_model(base("vit"), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(UserError, match=r"cannot be called with the example inputs"):
        fast(image)
    with pytest.raises(UserError, match="example_inputs is a Tensor: give the arguments"):
        fast(image, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes a model, not a str"):
        fast("inlay-tiny")  # type: ignore[arg-type]
    assert not any("forward" in vars(module) for module in image.modules())


def test_an_example_that_the_model_cannot_take_leaves_nothing_on_it(model: Any) -> None:
    with pytest.raises(TypeError):
        fast(model, {"pixels": IDS, "input_ids": IDS, "labels": "none"})
    fast(model).remove()
