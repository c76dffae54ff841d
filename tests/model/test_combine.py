"""Combining LoRAs, beside PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.core.errors import UserError
from inlay.model import combine
from tests.methods.bases import build, gpt2, llama, output, vit
from tests.model.nets import Net, config, shake
from tests.model.pairs import NAMES, both, deltas, same

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

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
WEIGHTS = [0.7, -0.4, 1.3]


def their_deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight(name).detach().float()
            if type(module).__name__ == "Embedding" or getattr(module, "fan_in_fan_out", False):
                delta = delta.T
            found[path] = delta.flatten(1)
    return found


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
