"""Switching turns the flags PEFT turns, from flat lists that follow the parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.methods.lora import LoraConfig
from inlay.model import gradients
from inlay.model.roster import Roster


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)


CONFIG = LoraConfig(target_modules=["0", "1", "2"], r=2)
HEADED = CONFIG.replace(modules_to_save=["head"])


def on(model: nn.Module) -> set[str]:
    """Return the names of the adapters that have a parameter requiring gradients."""
    split = (n.split(".") for n, p in model.named_parameters() if p.requires_grad)
    return {parts[parts.index("adapters") + 1] for parts in split}


def whole(model: nn.Module, name: str) -> set[bool]:
    return {p.requires_grad for n, p in model.named_parameters() if f".{name}." in n}


@pytest.fixture
def net() -> tuple[Net, Roster]:
    model = Net()
    roster = Roster(model)
    roster.add("a", CONFIG)
    roster.add("b", HEADED)
    roster.add("loaded", CONFIG, trainable=False)
    return model, roster


def test_of_the_adapters_in_training_those_selected_require_gradients(net):
    model, roster = net
    assert on(model) == {"a"}
    for chosen, expected in (
        (("b",), {"b"}),
        (("a",), {"a"}),
        (("a", "b"), {"a", "b"}),
        (("loaded",), set()),
        (("loaded", "b"), {"b"}),
        ((), set()),
        (("a",), {"a"}),
    ):
        roster.select(chosen)
        assert on(model) == expected
        assert all(whole(model, name) == {name in expected} for name in ("a", "b", "loaded"))
    roster.select(("a",), train=False)
    assert on(model) == set()


def test_the_flags_after_a_switch_are_pefts():
    peft = pytest.importorskip("peft")

    config = {"target_modules": ["0", "1", "2"], "r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(Net(), peft.LoraConfig(**config), adapter_name="a")
        theirs.add_adapter("b", peft.LoraConfig(**config))
    ours = Net()
    roster = Roster(ours)
    roster.add("a", LoraConfig(**config))
    roster.add("b", LoraConfig(**config))
    for name in ("a", "b", "b", "a"):
        theirs.set_adapter(name)
        roster.select((name,))
        counted = [
            sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)
        ]
        assert counted[0] == counted[1] > 0
        assert on(ours) == {name}


def test_a_selection_sets_right_what_was_set_by_hand(net):
    model, roster = net
    roster.adapters("a")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    roster.select(("a",))
    assert whole(model, "a") == {True}


def test_switching_walks_no_module_and_asks_no_host(monkeypatch):
    roster = Roster(Net())
    for name in ("a", "b"):
        roster.add(name, CONFIG)
        roster.select((name,))

    def walked(*args: object, **kwargs: object) -> None:
        raise AssertionError("walked over modules")

    for method in ("named_modules", "named_parameters", "modules", "children", "requires_grad_"):
        monkeypatch.setattr(nn.Module, method, walked)
    monkeypatch.setattr(roster, "hosts", None)
    for name in ("a", "b"):
        roster.select((name,))
        assert roster.selection.active == (name,)


def test_loaded_adapters_are_switched_by_one_assignment(monkeypatch):
    roster = Roster(Net())
    roster.add("a", CONFIG, trainable=False)
    roster.add("b", CONFIG, trainable=False)
    monkeypatch.setattr(gradients.Gradients, "_turn", None)
    roster.select(("b",))
    assert roster.selection.active == ("b",)
    assert on(roster.model) == set()


@pytest.mark.parametrize("how", ["set", "register", "assign", "copy"])
def test_the_lists_follow_parameters_that_are_replaced(net, how):
    model, roster = net
    roster.select(("b",))
    roster.select(("a",))  # now both are listed
    for name in ("a", "b"):
        for _, _, adapter in roster.adapters(name):
            for key, old in list(adapter.named_parameters()):
                owner = adapter.get_submodule(key.rpartition(".")[0])
                new = nn.Parameter(old.detach().clone(), old.requires_grad)
                if how == "set":
                    setattr(owner, key.rpartition(".")[2], new)
                elif how == "register":
                    owner.register_parameter(key.rpartition(".")[2], new)
    if how == "assign":
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    if how == "copy":
        import copy

        model, roster = copy.deepcopy((model, roster))
    roster.select(("b",))
    assert [whole(model, name) for name in ("a", "b")] == [{False}, {True}]
    roster.select(("a",))
    assert [whole(model, name) for name in ("a", "b")] == [{True}, {False}]


def test_a_parameter_without_memory_gets_its_flag_with_its_memory(net):
    model, roster = net
    made = roster.add("c", CONFIG, device=torch.device("meta"))
    roster.select(("c",))
    before = Adapter.placed
    for adapter in made.values():
        adapter.to_empty(device="cpu")
    assert Adapter.placed > before
    assert whole(model, "c") == {True}
    roster.select(("a",))
    assert whole(model, "c") == {False}


def test_a_removed_adapter_is_forgotten(net):
    model, roster = net
    roster.select(("b",))
    roster.remove("b")
    assert roster.selection.active == ("a",)
    assert on(model) == {"a"}
    roster.add("b", CONFIG)
    assert on(model) == {"a"}
    roster.select(("b",))
    assert on(model) == {"b"}
