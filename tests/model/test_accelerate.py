"""A model computes the same, and its gradients are the same, by fast paths as by plain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import inlay
from inlay.bases.plain import Linear
from inlay.core.adapter import Delta
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.kernels import lora
from inlay.methods import method, names
from inlay.model.accelerate import Node, accelerated
from inlay.model.fast import fast_paths
from inlay.model.thin import site
from tests.methods.bases import bert, build, gpt2, llama, randomize, settings_of_methods, t5

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(make: Callable[[], Any], config: Any) -> Any:
    model = inlay.get_peft_model(build(make), config).double()
    randomize(model, 0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def once(model: Any) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> None:
        logits(model)

    return run


def results(model: Any) -> list[torch.Tensor]:
    """Return the logits, and the gradient of every trained parameter."""
    torch.manual_seed(7)
    out = logits(model)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return [out.detach(), *grads]


def nodes(model: Any) -> dict[Inlaid, tuple[Node, int]]:
    """Return of each host that has one its node, and its number there."""
    hosts = [m for m in model.modules() if isinstance(m, Inlaid) and m.fast is not None]
    return {host: (host.fast.func.__self__, host.fast.args[0]) for host in hosts}


def taken(model: Any) -> list[Inlaid]:
    """Return the hosts whose active adapter is computed by a node."""
    (name,) = model.active_adapters
    return [host for host, (node, i) in nodes(model).items() if node.sites(name)[i] is not None]


def groups(model: Any) -> list[list[str]]:
    """Return the hosts that share a node, by the last parts of their paths."""
    paths = {m: path for path, m in model.named_modules() if isinstance(m, Inlaid)}
    found: dict[int, list[str]] = {}
    for host, (node, _) in nodes(model).items():
        found.setdefault(id(node), []).append(paths[host].rpartition(".")[2])
    return list(found.values())


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_by_its_node(make: Callable[[], Any], dropout: float) -> None:
    config = inlay.LoraConfig(r=3, lora_dropout=dropout, target_modules="all-linear")
    model = adapted(make, config).train()
    plain = results(model)
    with accelerated(model, once(model)):
        assert taken(model)
        assert_same(plain, results(model))
    assert not nodes(model)


def every_setting() -> list[Any]:
    settings = settings_of_methods()
    return [
        pytest.param(name, given, id=f"{name}-{i}")
        for name in names()
        for i, given in enumerate(getattr(settings.get(name), "LAWS", [{}]))
        if method(name).adapter is not None and issubclass(method(name).adapter, Delta)
    ]


@pytest.mark.filterwarnings("ignore:oft_block_size")
@pytest.mark.parametrize(("name", "given"), every_setting())
def test_every_additive_method(name: str, given: dict[str, Any]) -> None:
    """Where no thin factors say it, nothing is put on its hosts."""
    try:
        model = adapted(llama, method(name).config(**given))
    except UserError as error:
        pytest.skip(f"settings for another layer: {error}")
    plain = results(model)
    with accelerated(model, once(model)):
        hosts = [m for m in model.modules() if isinstance(m, Inlaid)]
        assert set(taken(model)) == {host for host in hosts if site(host, "default")}
        assert_same(plain, results(model))


def test_q_k_v_share_a_node_and_gate_and_up_another() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules="all-linear"))
    with accelerated(model, once(model)):
        assert sorted(map(tuple, groups(model))) == sorted(
            [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
            * 2
        )


def test_layers_that_are_fed_one_tensor_are_told_apart_from_those_that_are_not() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"]))
    with accelerated(model, once(model)):
        assert all(len(group) == 1 for group in groups(model))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_under_activation_checkpointing(targets: str | None) -> None:
    config = inlay.LoraConfig(r=2, lora_dropout=0.5, target_modules=targets)
    model = adapted(llama, config).train()
    plain = results(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with accelerated(model, once(model)):
        assert_same(plain, results(model))


def test_checkpointing_makes_no_product_again_that_nobody_needs(monkeypatch) -> None:
    """Of a layer all linears are computed again but the last, whose output goes on unread."""
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules="all-linear")).float().train()
    hosts = {path: m for path, m in model.named_modules() if isinstance(m, Inlaid)}
    names = {host.base: path.rpartition(".")[2] for path, host in hosts.items()}
    made: Counter[str] = Counter()
    product = Linear.forward_product

    def counted(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        made[names[layer]] += 1
        return product(layer, x)

    monkeypatch.setattr(Linear, "forward_product", counted)
    # two rows of 9 tokens behind one another, through the attention of packed rows
    packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.arange(9).repeat(2)[None]}
    model.activation_checkpointing_enable({"use_reentrant": False})
    with fast_paths(model, once(model)):
        made.clear()
        out = model(**packed, use_cache=False).logits
        assert set(made.values()) == {2}, "layers that hold all seven linears once"
        out.sum().backward()
    assert made.pop("down_proj") == 2
    assert set(made.values()) == {4}


def test_a_host_called_twice_computes_for_itself() -> None:
    """One layer that is fed again in a call is no member of a group."""
    model = adapted(llama, inlay.LoraConfig(r=2))
    layer = model.get_base_model().model.layers

    def twice() -> None:
        once(model)()
        once(model)()

    with accelerated(model, twice):
        assert all(len(group) == 1 for group in groups(model))
        assert len(taken(model)) == 2 * len(layer)


def test_an_output_nobody_uses() -> None:
    """The others' gradients are whole, and the input's too."""
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)

    def used() -> list[torch.Tensor]:
        attention.k_proj(x)
        attention.v_proj(x).square().sum().backward()
        trained = [x, *(p for p in attention.v_proj.adapters.parameters())]
        grads = [t.grad.clone() for t in trained if t.grad is not None]
        for tensor in trained:
            tensor.grad = None
        return grads

    plain = used()
    with accelerated(model, once(model)):
        assert_same(plain, used())


def test_a_tensor_that_was_written_to_is_computed_again() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    attention = model.get_base_model().model.layers[0].self_attn
    with accelerated(model, once(model)):
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        attention.k_proj(x)
        x.mul_(2)
        torch.testing.assert_close(
            attention.v_proj(x),
            attention.v_proj.stack(("default",))(x),
        )


def test_factors_that_were_written_to_compute_again() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    attention = model.get_base_model().model.layers[0].self_attn
    with accelerated(model, once(model)):
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        attention.k_proj(x)
        randomize(model, 0.5)
        torch.testing.assert_close(
            attention.v_proj(x),
            attention.v_proj.stack(("default",))(x),
        )


def test_few_tokens_without_a_gradient_are_computed_by_the_plain_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(llama, inlay.LoraConfig(r=2))
    rows: list[int] = []
    node = lora.adapted
    monkeypatch.setattr(lora, "adapted", lambda x, *rest: rows.append(len(x)) or node(x, *rest))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with accelerated(model, once(model)):
        for x in (torch.randn(n, 32, dtype=torch.float64) for n in (15, 16)):
            with torch.no_grad():
                layer(x)
        layer(x[:2])
    assert rows == [16, 2]


def test_rows_of_other_adapters_and_other_selections_take_the_plain_paths() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2))
    model.add_adapter("other", inlay.LoraConfig(r=3))
    randomize(model, 0.3)
    model.double().eval()
    wanted = model(input_ids=IDS, adapter_names=["other", "__base__"]).logits
    with accelerated(model, once(model)):
        torch.testing.assert_close(
            model(input_ids=IDS, adapter_names=["other", "__base__"]).logits, wanted
        )
        with model.disable_adapter():
            bare = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(bare, logits(model))


def test_frozen_factors_get_no_gradient() -> None:
    model = adapted(llama, inlay.LoraConfig(r=2, init_lora_weights="mica"))
    plain = results(model)
    with accelerated(model, once(model)):
        assert_same(plain, results(model))


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_dora_by_the_node(make: Callable[[], Any]) -> None:
    model = adapted(make, inlay.LoraConfig(r=3, use_dora=True, target_modules="all-linear"))
    plain = results(model)
    with accelerated(model, once(model)):
        assert taken(model)
        assert_same(plain, results(model))


def test_a_magnitude_of_zero_has_its_gradient() -> None:
    model = adapted(llama, inlay.LoraConfig(r=3, use_dora=True, target_modules="all-linear"))
    for path, parameter in model.named_parameters():
        if "magnitude" in path:  # its output tells nothing of what was multiplied
            parameter.data[1] = 0.0
    plain = results(model)
    with accelerated(model, once(model)):
        assert taken(model)
        assert_same(plain, results(model))


def test_dora_with_dropout_takes_the_plain_path() -> None:
    model = adapted(llama, inlay.LoraConfig(r=3, use_dora=True, lora_dropout=0.1))
    with accelerated(model, once(model)):
        assert not taken(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_over_a_packed_base(kind: str, dora: bool) -> None:
    base, _ = inlay.load_base(quantize=kind, dtype=torch.float32)
    config = inlay.LoraConfig(r=2, target_modules="all-linear", use_dora=dora)
    model = inlay.get_peft_model(base, config)
    randomize(model, 0.1)
    plain = results(model)
    with accelerated(model, once(model)):
        assert taken(model)
        for a, b in zip(plain, results(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_half_precision_by_autocast() -> None:
    model = adapted(llama, inlay.LoraConfig(r=4, target_modules="all-linear")).float()
    exact = results(model)

    def wrong(found: list[torch.Tensor]) -> list[float]:
        pairs = zip(found, exact, strict=True)
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    with torch.autocast("cpu", torch.bfloat16):
        plain = wrong(results(model))
        with accelerated(model, once(model)):
            assert taken(model)
            fast = wrong(results(model))
    # each is as far from float32 as the other, up to chance
    assert max(fast) < 1.5 * max(plain)
