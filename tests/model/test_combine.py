"""Combining LoRAs, beside PEFT; and what a LoRA of given rank is of other changes of weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.core.adapter import Reweight
from inlay.core.errors import UserError
from inlay.methods import method
from inlay.model import combine, lowrank
from tests.methods.bases import (
    build,
    gpt2,
    llama,
    output,
    randomize,
    settings_of_methods,
    vit,
)
from tests.model.nets import Net, config, shake

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def _is_a_weight(adapter: Any) -> bool:
    return adapter is not None and issubclass(adapter, Reweight) and "linear" in adapter.on


WAYS: list[dict[str, Any]] = [
    {"combination_type": "cat"},
    {"combination_type": "svd"},
    {"combination_type": "svd", "svd_rank": 2},
    {"combination_type": "svd", "svd_rank": 32, "svd_full_matrices": False},
    {"combination_type": "svd", "svd_rank": 3, "svd_clamp": 0.9},
    {"combination_type": "linear"},
    {"combination_type": "ties", "density": 0.4},
    {"combination_type": "ties", "density": 1.0, "majority_sign_method": "frequency"},
    {"combination_type": "ties_svd", "density": 0.3},
    {"combination_type": "ties_svd", "density": 0.5, "majority_sign_method": "frequency"},
    {"combination_type": "magnitude_prune", "density": 0.6},
    {"combination_type": "magnitude_prune_svd", "density": 0.2, "svd_rank": 5},
]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "vit": (vit, {"target_modules": ["query", "projection"]}),
}
METHODS = [
    pytest.param(name, settings, id=f"{name} {at}")
    for name, module in settings_of_methods().items()
    if _is_a_weight(method(name).adapter)
    for at, settings in enumerate(module.LAWS)
]
NAMES, WEIGHTS = ["default", "second", "third"], [0.7, -0.4, 1.3]


def both(make: Any, folder: Path, *settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return PEFT's model and ours with the same random adapters, called NAMES."""
    theirs = peft.get_peft_model(build(make), peft.LoraConfig(**settings[0]))
    for name, given in zip(NAMES[1:], settings[1:], strict=False):
        theirs.add_adapter(name, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    theirs.save_pretrained(folder)
    ours = inlay.PeftModel.from_pretrained(build(make), folder)
    for name in NAMES[1 : len(settings)]:
        ours.load_adapter(folder / name, name)
    return theirs.eval(), ours


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {path: a.delta(torch.float32) for path, _, a in model.roster.adapters(name)}


def their_deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight(name).detach().float()
            if type(module).__name__ == "Embedding" or getattr(module, "fan_in_fan_out", False):
                delta = delta.T
            found[path] = delta.flatten(1)
    return found


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=1e-5, msg=path)


@pytest.mark.parametrize("base", BASES)
def test_every_combination_without_chance_is_that_of_peft(base: str, tmp_path: Path) -> None:
    make, settings = BASES[base]
    theirs, ours = both(make, tmp_path, *({"r": 4, "lora_alpha": a, **settings} for a in (4, 8, 2)))
    for at, way in enumerate(WAYS):
        theirs.add_weighted_adapter(NAMES, WEIGHTS, f"way{at}", **way)
        ours.add_weighted_adapter(NAMES, WEIGHTS, f"way{at}", **way)
        same(deltas(ours, f"way{at}"), their_deltas(theirs, f"way{at}"))
        theirs.set_adapter(f"way{at}")
        ours.set_adapter(f"way{at}")
        torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", [{"combination_type": "cat"}, {"combination_type": "svd"}])
def test_ranks_and_sites_may_differ_where_updates_are_summed(
    way: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = both(
        llama,
        tmp_path,
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"r": 3, "target_modules": ["v_proj", "o_proj"], "alpha_pattern": {"0.*v_proj": 5}},
    )
    theirs.add_weighted_adapter(NAMES[:2], WEIGHTS[:2], "new", **way)
    ours.add_weighted_adapter(NAMES[:2], WEIGHTS[:2], "new", **way)
    same(deltas(ours, "new"), their_deltas(theirs, "new"))
    ours.save_pretrained(tmp_path / "again", selected_adapters=["new"])
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "again" / "new")
    same(deltas(back, "default"), deltas(ours, "new"))
    peft_back = peft.PeftModel.from_pretrained(build(llama), tmp_path / "again" / "new")
    same(their_deltas(peft_back, "default"), deltas(ours, "new"))


@pytest.mark.parametrize("way", ["cat", "svd", "linear"])
def test_rslora_is_combined_at_its_own_scale(way: str) -> None:
    # PEFT keeps use_rslora in the result, whose updates are then sqrt(r) times too large
    ours = inlay.get_peft_model(Net(), config("up", "head", use_rslora=True, lora_alpha=3))
    ours.add_adapter("second", config("up", "head", use_rslora=True))
    ours.add_weighted_adapter(["default", "second"], [1.0, 0.0], "new", way)
    same(deltas(ours, "new"), deltas(ours, "default"))


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_dropping_at_random_draws_what_peft_draws(how: str, majority: str) -> None:
    from peft.utils import merge_utils

    tensors = [torch.randn(5, 7) for _ in range(3)]
    torch.manual_seed(11)
    extra = {"majority_sign_method": majority} if how == "dare_ties" else {}
    wanted = getattr(merge_utils, how)(tensors, torch.tensor(WEIGHTS), 0.6, **extra)
    torch.manual_seed(11)
    found = combine.mixed(tensors, WEIGHTS, how, 0.6, majority)
    torch.testing.assert_close(found, wanted)


def test_dropping_at_random_keeps_the_mean() -> None:
    model = inlay.get_peft_model(Net(), config("up"))
    model.add_adapter("second", config("up"))
    wanted = {
        path: delta - 2 * deltas(model, "second")[path]
        for path, delta in deltas(model, "default").items()
    }
    torch.manual_seed(0)
    total = {path: torch.zeros_like(delta) for path, delta in wanted.items()}
    draws = 400
    for _ in range(draws):
        model.add_weighted_adapter(
            ["default", "second"], [1, -2], "new", "dare_linear_svd", svd_rank=4, density=0.5
        )
        for path, delta in deltas(model, "new").items():
            total[path] += delta / draws
        model.delete_adapter("new")
    for path, mean in total.items():
        largest = float(wanted[path].abs().max())
        torch.testing.assert_close(mean, wanted[path], rtol=0, atol=0.3 * largest)


def test_one_adapter_is_cut_in_rank_by_svd() -> None:
    # PEFT takes linear for one adapter, whatever is asked: its rank stays
    model = inlay.get_peft_model(Net(), config("up", "down"))
    model.add_weighted_adapter(["default"], [1.0], "new", "svd", svd_rank=1)
    for path, _, adapter in model.roster.adapters("new"):
        assert len(adapter.lora_A) == 1, path
        s = torch.linalg.svdvals(deltas(model, "default")[path])
        error = (deltas(model, "new")[path] - deltas(model, "default")[path]).norm()
        torch.testing.assert_close(error, s[1:].norm())


def test_a_copy_that_one_adapter_holds_goes_along_and_two_are_refused() -> None:
    model = inlay.get_peft_model(Net(), config("up", modules_to_save=["head"]))
    model.add_adapter("second", config("up"))
    model.add_adapter("third", config("up", modules_to_save=["head"]))
    shake(model.roster, "default")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "new", "cat")
    x = torch.randn(3, 4)
    held = model.roster.hosts["head"].adapters
    torch.testing.assert_close(
        held["new"](head_base(model), x), held["default"](head_base(model), x)
    )
    assert held["new"].module is not held["default"].module
    with pytest.raises(UserError, match=r"'head' has a trained copy in more than one"):
        model.add_weighted_adapter(["default", "third"], [0.5, 0.5], "other", "cat")
    assert "other" not in model.peft_config


@pytest.mark.parametrize("way", ["svd", "cat"])
def test_what_is_no_plain_lora_is_refused_until_it_is_converted(way: str) -> None:
    model = inlay.get_peft_model(Net(), config("up", "down"))
    model.add_adapter("scales", inlay.IA3Config(target_modules=["up"], feedforward_modules=[]))
    shake(model.roster, "scales")
    names = ["default", "scales"]
    with pytest.raises(UserError, match=r"'scales' is IA3, and only LoRAs.*convert it first"):
        model.add_weighted_adapter(names, [1.0, 1.0], "sum", way)
    assert list(model.peft_config) == names


def head_base(model: Any) -> Any:
    return model.roster.hosts["head"].base


def test_what_is_combined_trains_when_it_is_selected_and_not_before() -> None:
    model = inlay.get_peft_model(Net(), config("up"))
    model.add_weighted_adapter(["default"], [1.0], "new", "linear")
    parameters = [p for _, _, a in model.roster.adapters("new") for p in a.parameters()]
    assert not any(p.requires_grad for p in parameters)
    model.set_adapter("new")
    assert all(p.requires_grad for p in parameters)
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapters": []}, "must be a list of the adapters"),
        ({"adapters": "default"}, "must be a list of the adapters"),
        ({"adapters": ["default", "secnd"]}, "no adapter is called 'secnd'"),
        ({"adapters": ["default", "default"]}, "names an adapter twice"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"weights": [1.0, "2"]}, "must be numbers"),
        ({"adapter_name": "default"}, "an adapter called 'default' exists"),
        ({"combination_type": "sum"}, "not one of cat, svd"),
        ({"combination_type": "tie"}, "ties"),
        ({"combination_type": "ties"}, "needs the share of entries to keep"),
        ({"combination_type": "ties", "density": 0}, "above 0 and at most 1"),
        ({"combination_type": "ties", "density": 1.5}, "above 0 and at most 1"),
        ({"combination_type": "svd", "density": 0.5}, "density=0.5 has no meaning"),
        ({"combination_type": "cat", "svd_rank": 2}, "svd_rank=2 has no meaning"),
        ({"svd_rank": 0}, "svd_rank=0 must be"),
        ({"svd_rank": 2.0}, "svd_rank=2.0 must be"),
        ({"svd_clamp": 0.2}, "svd_clamp=0.2 is a quantile"),
        ({"svd_driver": "gesvd"}, "for CUDA only"),
        ({"svd_driver": "qr"}, "not one of gesvd"),
        ({"majority_sign_method": "sum"}, "not one of total, frequency"),
        ({"adapters": ["default", "third"], "combination_type": "linear"}, "needs one rank"),
        ({"adapters": ["default", "biased"]}, "trains biases"),
    ],
)
def test_what_has_no_meaning_is_refused_and_nothing_is_added(
    changes: dict[str, Any], reason: str
) -> None:
    model = inlay.get_peft_model(Net(), config("up"))
    model.add_adapter("second", config("up"))
    model.add_adapter("third", config("up").replace(r=3))
    model.add_adapter("biased", config("up", bias="lora_only"))
    given = {"adapters": ["default", "second"], "weights": [1.0, 1.0], "adapter_name": "new"}
    with pytest.raises(UserError, match=reason):
        model.add_weighted_adapter(**{**given, **changes})
    assert list(model.peft_config) == ["default", "second", "third", "biased"]


def test_nothing_is_combined_while_an_adapter_is_merged() -> None:
    model = inlay.get_peft_model(Net(), config("up"))
    model.merge_adapter()
    with pytest.raises(UserError, match="merged"):
        model.add_weighted_adapter(["default"], [1.0], "new")


# -- low rank


@pytest.mark.parametrize(("o", "i", "r"), [(9, 7, 2), (5, 8, 6), (4, 4, 9), (300, 200, 3)])
def test_the_values_of_a_product_are_those_of_the_matrix(o: int, i: int, r: int) -> None:
    b, a = torch.randn(o, r).double(), torch.randn(r, i).double()
    found = lowrank.of_product(b, a)
    assert len(found.s) == min(o, i, r)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(b @ a)[: len(found.s)])
    left, right = found.factors(len(found.s))
    torch.testing.assert_close(left @ right, b @ a)
    assert found.u.shape == (o, len(found.s))


def test_a_share_of_the_squares_takes_the_fewest_values_that_hold_it() -> None:
    found = lowrank.Spectrum(torch.eye(4), torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.eye(4))
    assert [found.rank(share) for share in (0.5, 9 / 14, 0.7, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert [found.rank(count) for count in (1, 4, 9)] == [1, 4, 4]
    zero = lowrank.Spectrum(torch.eye(2), torch.zeros(2), torch.eye(2))
    assert zero.rank(0.9) == 1


# -- conversion


def test_a_lora_is_converted_with_the_error_of_its_cut() -> None:
    model = inlay.get_peft_model(Net(), config("up", "down", modules_to_save=["head"]).replace(r=3))
    shake(model.roster, "default")
    exact = model.convert_to_lora("default", 3, "exact")
    assert exact.total < 1e-6
    same(matrices(model, "exact"), matrices(model, "default"))
    torch.testing.assert_close(run(model, "exact"), run(model, "default"))

    cut = model.convert_to_lora("default", 1, "cut")
    assert set(cut.ranks.values()) == {1}
    lost = whole = 0.0
    for path, delta in matrices(model, "default").items():
        error = (matrices(model, "cut")[path] - delta).norm()
        assert cut.errors[path] == pytest.approx(float(error / delta.norm()), rel=1e-4)
        lost, whole = lost + float(error**2), whole + float(delta.norm() ** 2)
    assert cut.total == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert f"{cut.total:.2%}" in str(cut)

    most = model.convert_to_lora("default", 0.9, "most")
    assert most.total <= 0.1**0.5
    assert model.active_adapters == ["default"]


def matrices(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {path: d for path, d in _deltas_of_loras(model, name)}


def _deltas_of_loras(model: Any, name: str) -> Any:
    for path, _, adapter in model.roster.adapters(name):
        if hasattr(adapter, "delta"):
            yield path, adapter.delta(torch.float32).detach()


def run(model: Any, name: str) -> torch.Tensor:
    with model.roster.selection.using(active=(name,)), torch.no_grad():
        return model(torch.linspace(-1, 1, 8).reshape(2, 4))


def test_the_functions_of_peft_convert_and_save(tmp_path: Path) -> None:
    model = inlay.get_peft_model(build(llama), inlay.LoraConfig(r=4, target_modules=["q_proj"]))
    randomize(model)
    expected = output(model)
    settings, tensors = inlay.convert_to_lora(model, 4)
    assert (settings.r, settings.lora_alpha) == (4, 4)
    found = inlay.save_as_lora(tmp_path, model, 4)
    assert found.total < 1e-6
    assert list(model.peft_config) == ["default"]
    back = peft.PeftModel.from_pretrained(build(llama), tmp_path).eval()
    torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-5)
    wanted = peft.get_peft_model_state_dict(back)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_every_method_that_is_a_weight_is_a_lora_of_full_rank(
    name: str, settings: dict[str, Any]
) -> None:
    base = nn.Sequential(nn.Linear(120, 120), nn.Tanh())  # a size that blocks divide
    model = inlay.get_peft_model(base, method(name).config(target_modules=["0"], **settings))
    randomize(model.eval())  # some methods draw at random in training
    x = torch.linspace(-1, 1, 240).reshape(2, 120)
    _, host, adapter = next(model.roster.adapters("default"))
    below = host.base.bias()
    if not torch.equal(adapter.rebias(host.base), below):
        with pytest.raises(UserError, match="changes the bias"):
            model.convert_to_lora("default", 120, "new")
        return
    found = model.convert_to_lora("default", 120, "new")
    assert found.total < 1e-5
    with torch.no_grad():
        expected = model(x)
        model.set_adapter("new")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 0.8])
def test_a_lora_is_cut_where_peft_cuts_it(rank: Any, tmp_path: Path) -> None:
    theirs, ours = both(llama, tmp_path, {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    ours.convert_to_lora("default", rank, "new")
    _, tensors = peft.convert_to_lora(theirs, rank)
    wanted = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[
            key.replace("lora_A", "lora_B")
        ]
        @ a
        for key, a in tensors.items()
        if "lora_A" in key
    }
    same(deltas(ours, "new"), wanted)


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(0, "a whole"), (True, "a whole"), (1.5, "at most 1"), (0.0, "above 0"), ("4", "rank")],
)
def test_a_rank_that_is_none_is_refused(rank: Any, reason: str) -> None:
    model = inlay.get_peft_model(Net(), config("up"))
    with pytest.raises(UserError, match=reason):
        model.convert_to_lora("default", rank, "new")


def test_what_no_lora_holds_is_refused() -> None:
    model = inlay.get_peft_model(Net(), config("up", bias="all"))
    shake(model.roster, "default")
    with pytest.raises(UserError, match="changes the bias"):
        model.convert_to_lora("default", 2, "new")
    assert list(model.peft_config) == ["default"]


# -- two full models


def test_a_tuned_model_becomes_a_lora_and_what_is_left_out_is_named() -> None:
    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.first.up.weight.add_(torch.randn(6, 2) @ torch.randn(2, 4))
        tuned.second.down.weight.add_(torch.randn(4, 2) @ torch.randn(2, 6))
    x = torch.randn(3, 4)
    expected = tuned(x)
    model, found = inlay.extract_lora(copy.deepcopy(base), tuned, 2)
    assert found.total < 1e-5
    assert not found.left_out
    assert set(found.errors) == {"first.up", "second.down"}
    torch.testing.assert_close(model(x), expected)

    with torch.no_grad():
        tuned.norm.weight.add_(3)
        tuned.first.up.bias.add_(1)
    model, found = inlay.extract_lora(copy.deepcopy(base), tuned, 0.999)
    assert set(found.left_out) == {"norm.weight", "first.up.bias"}
    merged = model.merge_and_unload()
    lost = sum(float((a - b).square().sum()) for a, b in pairs(merged, tuned))
    whole = sum(float((a - b).square().sum()) for a, b in pairs(base, tuned))
    assert found.total == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def pairs(one: nn.Module, other: nn.Module) -> Any:
    return zip(one.parameters(), other.parameters(), strict=True)


def test_a_tied_head_counts_once_and_an_untied_one_is_seen() -> None:
    base, tuned = build(lambda: llama(tie_word_embeddings=True)), build(llama)
    with torch.no_grad():
        tuned.load_state_dict(base.state_dict())
        tuned.lm_head.weight.add_(1)
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    _, found = inlay.extract_lora(base, tuned, 2)
    assert set(found.errors) == {"model.layers.0.mlp.up_proj"}
    assert set(found.left_out) == {"lm_head.weight"}


def test_models_that_cannot_be_compared_are_refused() -> None:
    base = Net()
    with pytest.raises(UserError, match="plain one beside the base"):
        inlay.extract_lora(base, base, 2)
    with pytest.raises(UserError, match="plain one beside the base"):
        inlay.extract_lora(base, inlay.get_peft_model(Net(), config("up")), 2)
    with pytest.raises(UserError, match="do not differ"):
        inlay.extract_lora(base, copy.deepcopy(base), 2)
    other = Net()
    other.head = nn.Linear(4, 5)
    with pytest.raises(UserError, match="2 parameters have no counterpart of the same shape, 'hea"):
        inlay.extract_lora(base, other, 2)
    assert not inlay.get_peft_model(base, config("up")).roster.selection.merged
