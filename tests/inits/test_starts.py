"""Starts computed from the base: the layer begins as it was, the base stays, the files say all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay import inits
from inlay.core.errors import UserError
from inlay.inits import pissa
from tests.methods.bases import build, gpt2, llama, output, randomize
from tests.model.nets import Net, config, shake, trace

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FILE = "adapter_model.safetensors"
FROM_THE_BASE = ["pissa", "pissa_niter_4", "olora"]
ALL = [*FROM_THE_BASE, "orthogonal"]
ONE_ZERO = ["mica"]
QUANTIZED = ["loftq"]


def started(init: str, base: nn.Module | None = None, **settings: Any) -> Any:
    return inlay.get_peft_model(
        base or Net(), config("up", "down", **settings).replace(init_lora_weights=init)
    )


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def test_every_start_is_tried() -> None:
    known = {init for init in inits.names() if not inits.from_data(init)}
    tried = {*ALL, *ONE_ZERO, *QUANTIZED}
    assert {init.partition("_niter_")[0] for init in tried} == known


# -- the factors


def test_pissa_takes_the_largest_singular_values() -> None:
    weight = torch.randn(9, 7, dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    largest = u[:, :3] @ s[:3].diag() @ v[:3]
    for init in ("pissa", "pissa_niter_16"):
        found = inits.start(init, weight, 3, 2.5)
        torch.testing.assert_close(2.5 * found.b @ found.a, largest, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.b.T @ found.b, found.a @ found.a.T, rtol=0, atol=1e-6)


def test_the_search_nears_the_largest_values_with_each_round() -> None:
    weight = torch.linalg.qr(torch.randn(80, 80))[0] @ torch.linspace(1, 0.01, 80).diag()
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :4] @ s[:4].diag() @ v[:4]
    errors = []
    for rounds in (0, 2, 8, 64):
        b, a = pissa.start(weight, 4, 1.0, rounds)
        errors.append(float((b @ a - best).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_olora_takes_the_first_columns_of_the_orthonormal_factor() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    found = inits.start("olora", weight, 4, 3.0)
    torch.testing.assert_close(found.b.T @ found.b, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((found.b @ found.a)[:, :4], weight[:, :4])


def test_an_orthogonal_start_is_zero_of_two_factors_that_are_not() -> None:
    found = inits.start("orthogonal", torch.empty(30, 20), 6, 1.0)
    assert not found.from_the_base
    torch.testing.assert_close(found.b @ found.a, torch.zeros(30, 20), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(found.a) == torch.linalg.matrix_rank(found.b) == 3


# -- in a model


@pytest.mark.parametrize("init", ALL)
def test_the_model_begins_as_it_was_and_the_base_stays(init: str) -> None:
    base = Net()
    before, expected = trace(base), base(x())
    model = started(init, base, lora_alpha=7)
    torch.testing.assert_close(model(x()), expected)
    adapters = [adapter for _, _, adapter in model.roster.adapters("default")]
    assert all(bool(p.any()) for a in adapters for p in (a.lora_A, a.lora_B))
    shake(model.roster, "default")
    changed = model(x())
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x()), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x()), changed)
    model.unmerge_adapter()
    assert trace(model.unload()) == before


@pytest.mark.parametrize("init", ALL)
def test_a_second_adapter_sees_the_whole_base(init: str) -> None:
    base = Net()
    plain = config("up", "down")
    alone = inlay.get_peft_model(copy.deepcopy(base), plain)
    model = started(init, base)
    model.add_adapter("second", plain)
    shake(alone.roster, "default", seed=4)
    theirs = dict((path, a) for path, _, a in alone.roster.adapters("default"))
    with torch.no_grad():
        for path, _, adapter in model.roster.adapters("second"):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(theirs[path].get_parameter(name))
    model.set_adapter("second")
    assert torch.equal(model(x()), alone(x()))
    model.set_adapter("default")
    rows = model(x(), adapter_names=["default", "second", "__base__"])
    torch.testing.assert_close(rows[:1], model(x())[:1])
    torch.testing.assert_close(rows[1:2], alone(x())[1:2])


@pytest.mark.parametrize("init", FROM_THE_BASE)
def test_it_trains_as_a_lora_over_what_is_left_of_the_base(init: str) -> None:
    base, settings = Net(), {"lora_alpha": 3, "lora_dropout": 0.4}
    left = copy.deepcopy(base)
    model = started(init, base, **settings)
    twin = inlay.get_peft_model(left, config("up", "down", **settings))
    with torch.no_grad():
        for (_, host, ours), (_, other, theirs) in zip(
            model.roster.adapters("default"), twin.roster.adapters("default"), strict=True
        ):
            theirs.lora_A.copy_(ours.lora_A)
            theirs.lora_B.copy_(ours.lora_B)
            start = ours.start_B @ ours.start_A
            other.base_layer.weight.copy_(host.base.weight() - ours.config.scaling * start)
    gradients = []
    for side in (model, twin):
        torch.manual_seed(2)
        side.train()
        side(x()).square().sum().backward()
        gradients.append(
            [p.grad for _, _, a in side.roster.adapters("default") for p in a.parameters()]
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", FROM_THE_BASE)
def test_the_start_follows_the_model_and_its_copies(init: str) -> None:
    model = started(init)
    twin = copy.deepcopy(model)
    shake(model.roster, "default")
    assert not torch.allclose(twin(x()), model(x()), atol=1e-3)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x().double()).float(), model(x()))
    assert not any("start" in key for key in model.state_dict())


def test_the_start_is_the_same_each_time() -> None:
    base = Net()
    first, second = (
        [p for _, _, a in m.roster.adapters("default") for p in a.parameters()]
        for m in (started(init, copy.deepcopy(base)) for init in ["pissa_niter_2"] * 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- files


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_file_of_peft_goes_both_ways(init: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(init_lora_weights=init, **settings))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / who / FILE) for who in ("theirs", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-5)
    wanted, found = theirs.merge_and_unload().state_dict(), ours.merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_first_factors_are_pefts(init: str) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(init_lora_weights=init, **settings))
    ours = inlay.get_peft_model(build(llama), inlay.LoraConfig(init_lora_weights=init, **settings))
    wanted = peft.get_peft_model_state_dict(theirs)
    found = inlay.get_peft_model_state_dict(ours)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("init", FROM_THE_BASE)
@pytest.mark.parametrize("rslora", [False, True])
def test_saved_as_a_plain_lora_it_needs_nothing_but_the_base(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["c_attn"]}
    model = inlay.get_peft_model(
        build(gpt2), inlay.LoraConfig(init_lora_weights=init, fan_in_fan_out=True, **settings)
    )
    randomize(model)
    expected = output(model.eval())
    model.save_pretrained(tmp_path, as_plain_lora=True)
    assert list(model.peft_config) == ["default"]
    for library in (peft, inlay):
        back = library.PeftModel.from_pretrained(build(gpt2), tmp_path).eval()
        torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-5)
    assert back.peft_config["default"].init_lora_weights is True
    assert back.peft_config["default"].r == 8


def test_what_was_found_at_random_is_saved_plain_and_pefts_file_of_it_refused(
    tmp_path: Path,
) -> None:
    settings = {"r": 4, "init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj"]}
    model = inlay.get_peft_model(build(llama), inlay.LoraConfig(**settings))
    randomize(model)
    model.eval().save_pretrained(tmp_path / "ours")
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "ours")
    torch.testing.assert_close(output(back), output(model), rtol=0, atol=1e-5)
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        inlay.PeftModel.from_pretrained(build(llama), tmp_path / "theirs")


@pytest.mark.parametrize("init", FROM_THE_BASE)
def test_it_is_converted_with_its_start_and_not_combined_without(init: str) -> None:
    model = started(init)
    shake(model.roster, "default")
    expected = model(x())
    with pytest.raises(UserError, match="start taken off the base"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert model.convert_to_lora("default", 4, "plain").total < 1e-5
    model.set_adapter("plain")
    torch.testing.assert_close(model(x()), expected)


# -- what is refused


@pytest.mark.parametrize("init", ["pizza", "pissa_niter_", "pissa_niter_x", "Gaussian", "cord", 3])
def test_a_start_that_is_none_is_refused(init: Any) -> None:
    with pytest.raises(UserError, match="is not one of true, false, gaussian, pissa"):
        inlay.LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("init", "settings", "reason"),
    [
        ("pissa", {"r": 5}, "has at most rank 4"),
        ("orthogonal", {"r": 3}, "needs an even rank, not 3"),
        ("pissa", {"lora_alpha": -1}, "a scale above 0"),
        ("pissa_niter_4", {"bias": "all"}, "has no place in the files"),
    ],
)
def test_a_start_that_the_layer_cannot_have_is_refused(
    init: str, settings: dict[str, Any], reason: str
) -> None:
    base = Net()
    before = trace(base)
    with pytest.raises(UserError, match=reason):
        inlay.get_peft_model(base, config("up").replace(init_lora_weights=init, **settings))
    assert trace(base) == before


def test_a_convolution_has_no_such_start() -> None:
    with pytest.raises(UserError, match="a conv takes the plain start"):
        inlay.get_peft_model(
            nn.Sequential(nn.Conv1d(4, 4, 3)),
            inlay.LoraConfig(target_modules=["0"], r=2, init_lora_weights="olora"),
        )
