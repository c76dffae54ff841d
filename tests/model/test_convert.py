"""What a LoRA of given rank is of other changes of weights: of any method's, of a tuned model's."""

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
from inlay.model import lowrank
from tests.methods.bases import build, llama, output, randomize, settings_of_methods
from tests.model.nets import Net, config, shake
from tests.model.pairs import both, deltas, same

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def _is_a_weight(adapter: Any) -> bool:
    return adapter is not None and issubclass(adapter, Reweight) and "linear" in adapter.on


METHODS = [
    pytest.param(name, settings, id=f"{name} {at}")
    for name, module in settings_of_methods().items()
    if _is_a_weight(method(name).adapter)
    for at, settings in enumerate(module.LAWS)
]


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
