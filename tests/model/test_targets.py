"""Which modules are meant: PEFT's sites, and an error for every name that means nothing."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from inlay.core import patterns
from inlay.core.errors import UserError
from inlay.methods.lora import LoraConfig
from inlay.model import targets
from inlay.model.roster import Roster


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(4, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.my_lora_block = Attention()


class Net(nn.Module):
    """What transformers' models look like, with names that invite mistakes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.head = nn.Linear(4, 2)
        self.lm_head = nn.Linear(4, 9, bias=False)


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["attn.q_proj", "lm_head"]},
    {"target_modules": ["model.layers.1.attn.k_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": r".*layers\.[02]\.attn\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.\d+\.experts\.1"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["attn.k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "1"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": []},
    {"target_modules": ["0"], "layers_to_transform": [0], "layers_pattern": ["x", "layers"]},
    {"target_modules": ["model.layers.0.attn.q_proj", "k_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "head"], "modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["my_lora_block"]},
    {"target_modules": ["embed", "q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 3}},
    {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {r"layers\.0\.attn\..*": 5, "k_proj": 1},
        "alpha_pattern": {r"^model\.layers\.1\.attn\.q_proj": 64, "q_proj": 2},
    },
]


def by_peft(model: nn.Module, settings: dict[str, Any]) -> Any:
    peft = pytest.importorskip("peft")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_the_sites_with_their_ranks_and_scales_are_pefts(settings):
    ours, theirs = Net(), by_peft(Net(), settings)
    roster = Roster(ours)
    made = roster.add("a", LoraConfig(**settings))
    expected = {
        path: (layer.r["default"], layer.scaling["default"])
        for path in theirs.base_model.targeted_module_names
        for layer in [theirs.base_model.model.get_submodule(path)]
    }
    saved = {p for p in made if type(made[p]).__name__ == "Copy"}
    found = {p: (a.config.r, a.config.scaling) for p, a in made.items() if p not in saved}
    assert found == expected
    names = settings.get("modules_to_save", [])
    assert saved == set(names) - {"my_lora_block"} | (
        {"model.my_lora_block"} if "my_lora_block" in names else set()
    )
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj', which no module.*Did you mean 'q_proj'\?"),
        ({"target_modules": ["q_proj", "vproj"]}, r"'vproj', which no.*Did you mean 'v_proj'\?"),
        ({"target_modules": ["proj"]}, "which no module of this model is called"),
        ({"target_modules": r".*\.q_porj"}, r"matches no module.*layers are .*k_proj"),
        ({"target_modules": []}, r"target_modules=\[\] matches no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["haed"]}, "modules_to_save.*'head'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["kproj"]}, "exclude_modules.*'k_proj'"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ".*kproj"},
            r"exclude_modules='\.\*kproj' matches no",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            r"with {'exclude_modules': .*matches no module",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
            r"layers_to_transform names \[7\]; the model's layers go up to 2",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_porj": 4}},
            "rank_pattern names 'q_porj', which is the end of no adapted.*Did you mean 'q_proj'",
        ),
        ({"target_modules": ["norm"]}, "is a LayerNorm, to which Lora cannot be set"),
        ({}, "no usual target_modules are known for model_type None"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused_and_changes_nothing(settings, says):
    model = Net()
    model.head.requires_grad_(False)
    before = [(n, id(m)) for n, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    roster = Roster(model)
    with pytest.raises(UserError, match=says):
        roster.add("a", LoraConfig(**settings))
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (roster.names, roster.hosts, roster.trainable) == ((), {}, set())
    roster.add("a", LoraConfig(target_modules=["q_proj"]))


def test_a_file_may_name_modules_the_model_has_not():
    sites = targets.resolve(
        Net(), LoraConfig(target_modules=["q_proj", "qkv"], exclude_modules=["x"]), strict=False
    )
    assert len(sites.adapted) == 4
    with pytest.raises(UserError, match="matches no module"):
        targets.resolve(Net(), LoraConfig(target_modules=["qkv"]), strict=False)


def test_a_shorthand_is_spelled_out_in_the_models_own_configuration_alone():
    rest = ["head", "lm_head", "0", "1", "2"]
    given = LoraConfig(target_modules="all-linear", exclude_modules=rest)
    roster, other = Roster(Net()), Roster(nn.Sequential(nn.Linear(2, 2)))
    roster.add("a", given)
    assert roster.configs["a"].target_modules == ["k_proj", "q_proj", "v_proj"]
    assert given.target_modules == "all-linear"
    other.add("a", given.replace(exclude_modules=None))
    assert other.configs["a"].target_modules == ["0"]

    roster = Roster(Net())
    roster.add("a", LoraConfig(target_modules="all-linear", layers_to_transform=1))
    spelled = roster.configs["a"].target_modules
    assert set(spelled) == set(roster.hosts)
    assert all(path.startswith("model.layers.1.") for path in spelled)


def test_modules_to_save_names_whole_segments_and_the_outermost_only():
    """PEFT's endswith also takes lm_head for head."""
    sites = targets.resolve(
        Net(), LoraConfig(target_modules=["k_proj"], modules_to_save=["head", "attn", "q_proj"])
    )
    inside = tuple(f"model.layers.{i}.attn" for i in range(3))
    assert set(sites.saved) == {"head", *inside, "model.my_lora_block.q_proj"}
    assert sites.adapted == ("model.my_lora_block.k_proj",)


def test_an_attribute_called_bias_that_is_no_parameter_is_none():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.ones(3, 3))
            self.linear = nn.Linear(3, 3)

    sites = targets.resolve(Masked(), LoraConfig(target_modules=["linear"], bias="all"))
    assert (sites.adapted, sites.biased) == (("linear",), ())


def test_a_bias_no_layer_view_can_hold_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"'1' is a BatchNorm1d.*say bias='lora_only'"):
        Roster(model).add("a", LoraConfig(target_modules=["0"], bias="all"))


def test_biases_inside_a_copied_module_train_with_the_copy():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3))})
    config = LoraConfig(target_modules=["a"], bias="all", modules_to_save=["b"])
    sites = targets.resolve(model, config)
    assert (sites.adapted, sites.saved, sites.biased) == (("a",), ("b",), ())


def test_a_layer_its_parent_reads_past_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    with pytest.raises(UserError, match=r"'attn\.out_proj' cannot be adapted: MultiheadAttention"):
        targets.resolve(model, LoraConfig(target_modules="all-linear"))
    config = LoraConfig(target_modules="all-linear", exclude_modules=["out_proj"])
    assert targets.resolve(model, config).adapted == ("up",)


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["shared"]}, {"modules_to_save": "shared"}]
)
def test_an_embedding_that_only_keeps_a_weight_for_others_is_refused(architecture, settings):
    with pytest.raises(UserError, match=r"'shared' cannot be adapted.*name 'embed_tokens'"):
        Roster(architecture("t5")).add("a", LoraConfig(**{"target_modules": ["q"], **settings}))


def test_a_module_on_several_paths_is_one_site_under_the_first():
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = nn.Sequential(model["a"], model["a"])
    assert [path for path, _ in targets.modules(model)] == ["a", "b", "b.0", "b.1"]
    sites = targets.resolve(model, LoraConfig(target_modules=["1"]))
    assert sites.adapted == ("a",)


SLOW = r"(?:[\w.]|\w\w|\w\w\w|[a-z]{4}|.{5}|[^x]{6})+(?<![a-z])"
BOMBS: list[dict[str, Any]] = [
    {"target_modules": SLOW},
    {"target_modules": ["q_proj"], "exclude_modules": SLOW},
    {"target_modules": ["q_proj"], "rank_pattern": {f"{SLOW}|{i}": 2 for i in range(999)}},
    {"target_modules": ["q_proj"], "alpha_pattern": {f"(x){i}": 2 for i in range(1001)}},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": f"{SLOW}(?!.)"},
    {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": [f"{SLOW}(?!.){i}" for i in range(999)],
    },
    {"target_modules": "(" * 4000 + ")" * 4000},
    {"target_modules": "((a{1000}){1000}){1000}"},
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: str(bomb)[:60])
def test_expressions_that_would_take_minutes_are_refused_within_the_budget(
    bomb, strict, monkeypatch
):
    assert patterns.BUDGET + patterns.SECONDS < 3
    monkeypatch.setattr(patterns, "BUDGET", 0.4)  # the tests' time, too, is limited
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(UserError):
        Roster(Net()).add("a", LoraConfig(**bomb), strict=strict)
    # the budget, one expression that began within it, and room for a busy machine
    assert time.perf_counter() - start < 4 * (patterns.BUDGET + patterns.SECONDS)


def test_many_names_are_looked_up_and_not_walked_through():
    many = [f"name{i}" for i in range(90_000)]
    settings = {
        "target_modules": [*many, "q_proj"],
        "exclude_modules": [*many, "my_lora_block.q_proj"],
        "modules_to_save": [*many, "head"],
        "rank_pattern": {**dict.fromkeys(many, 3), "q_proj": 4},
    }
    config = LoraConfig(**settings)
    start = time.perf_counter()
    made = Roster(Net()).add("a", config, strict=False)
    assert time.perf_counter() - start < 5  # names x modules comparisons would be minutes
    assert {a.config.r for a in made.values() if hasattr(a, "lora_A")} == {4}
    with pytest.raises(UserError, match="and 89990 more, which no module") as error:
        Roster(Net()).add("a", config)
    assert len(str(error.value)) < 1_000
