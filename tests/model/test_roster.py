"""Adding, choosing and removing: whole or not at all, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.base import Base
from inlay.core.beside import Bias
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.roster import Roster
from tests.model.nets import Block, Net, config, shake, trace


@pytest.fixture
def net() -> tuple[Net, Roster, torch.Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.requires_grad_(False)
    return model, Roster(model), torch.randn(5, 4)


# -- adding and removing


def test_every_adapter_added_and_removed_leaves_the_model_as_it_was(net):
    model, roster, _ = net
    before = trace(model)
    roster.add("a", config("up", "down", modules_to_save=["head"]))
    roster.add("b", config("up", bias="all"))
    assert set(roster.hosts) == {
        *(f"{block}.{layer}" for block in ("first", "second") for layer in ("up", "down")),
        "norm",
        "head",
    }
    kinds = {path: type(adapter) for path, _, adapter in roster.adapters("b")}
    assert kinds["norm"] is kinds["head"] is kinds["first.down"] is Bias
    roster.remove("a")
    assert roster.selection.active == ("b",)
    roster.remove("b")
    assert roster.hosts == {}
    assert trace(model)[0] == before[0]
    roster.take_out(merged=False)
    assert trace(model) == before


def test_an_adapter_is_removed_also_where_a_modules_name_looks_like_an_adapters():
    model = nn.ModuleDict({"my_lora_A_block": Block(), "lora_B": nn.Linear(4, 4)})
    before = trace(model)
    roster = Roster(model)
    roster.add("lora", config("up", "lora_B"))
    roster.add("other", config("up"))
    roster.remove("lora")
    assert (
        {path for path, _, _ in roster.adapters("other")}
        == {"my_lora_A_block.up"}
        == set(roster.hosts)
    )
    assert not any("lora.lora_A" in name for name, _ in model.named_parameters())
    roster.take_out(merged=False)
    assert trace(model) == before


def test_layers_that_store_their_weight_either_way_share_one_configuration():
    """PEFT's fan_in_fan_out is flipped by the last layer it meets; here each layer knows."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 4), Conv1D(3, 4))
    roster, x = Roster(model), torch.randn(2, 4)
    given = config("0", "1", "2", fan_in_fan_out=True)
    roster.add("a", given)
    expected = model(x)
    roster.merge()
    torch.testing.assert_close(model(x), expected)
    assert given.fan_in_fan_out is roster.configs["a"].fan_in_fan_out is True


@pytest.mark.parametrize(
    "name", ["", "__base__", "a.b", "a b", "items", "training", "x" * 65, "é", 3, None]
)
def test_a_name_that_cannot_be_is_refused(net, name):
    _, roster, _ = net
    with pytest.raises(UserError, match="cannot name an adapter"):
        roster.add(name, config("up"))


def test_a_name_is_taken_once_and_only_known_ones_are_chosen(net):
    _, roster, _ = net
    roster.add("first_one", config("up"))
    with pytest.raises(UserError, match="'first_one' exists"):
        roster.add("first_one", config("up"))
    for ask in (roster.remove, lambda n: roster.select((n,)), lambda n: roster.merge((n,))):
        with pytest.raises(UserError, match=r"'first_on'; this.*Did you mean 'first_one'\?"):
            ask("first_on")
    with pytest.raises(UserError, match="names an adapter twice"):
        roster.select(("first_one", "first_one"))


def test_one_adapter_of_a_model_trains_biases(net):
    model, roster, _ = net
    roster.add("a", config("up", bias="lora_only"))
    before = trace(model)
    with pytest.raises(UserError, match="'b' trains biases, but 'a' does already"):
        roster.add("b", config("up", bias="all"))
    assert trace(model) == before
    roster.remove("a")
    roster.add("b", config("up", bias="all"))


def test_an_error_in_the_middle_of_adding_leaves_the_model_as_it_was(net, monkeypatch):
    model, roster, _ = net
    roster.add("a", config("up"))
    before, rosters = trace(model), (roster.names, dict(roster.hosts), set(roster.trainable))
    count = iter(range(100))

    def fail(self: Adapter, base: Base) -> None:
        if next(count) == 2:
            raise MemoryError

    monkeypatch.setattr("inlay.methods.lora.Lora.reset", fail)
    with pytest.raises(MemoryError):
        roster.add("b", config("up", "down"))
    assert trace(model) == before
    assert (roster.names, roster.hosts, roster.trainable) == rosters


def test_a_new_adapter_is_in_the_mode_of_its_layer(net):
    model, roster, _ = net
    model.first.train()
    made = roster.add("a", config("up"))
    assert [adapter.training for adapter in made.values()] == [True, False]


def test_a_model_another_roster_holds_is_refused(net):
    model, roster, _ = net
    roster.add("a", config("up"))
    before = trace(model)
    with pytest.raises(UserError, match=r"'first.up' holds adapters of another wrapper"):
        Roster(model).add("b", config("up"))
    assert trace(model) == before


def test_parameters_without_memory_wait_for_a_loader(net):
    _, roster, _ = net
    made = roster.add("a", config("up"), device=torch.device("meta"))
    assert {p.device.type for a in made.values() for p in a.parameters()} == {"meta"}


def test_a_model_taken_out_begins_anew_with_the_flags_it_then_has(net):
    model, roster, _ = net
    roster.add("a", config("up"))
    roster.take_out(merged=False)
    assert (roster.names, roster.hosts, roster.selection.active) == ((), {}, ())
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    before = trace(model)
    roster.add("a", config("down"))
    roster.select(("a",))
    assert not model.head.weight.requires_grad
    roster.take_out(merged=False)
    assert trace(model) == before


# -- one module, several places


def test_a_shared_layer_is_adapted_once_on_every_path(net):
    model, roster, x = net
    model.second.up = model.first.up
    model.first.again = model.first.up
    before = trace(model)
    roster.add("a", config("again", "down"))
    assert list(roster.hosts) == ["first.up", "first.down", "second.down"]
    assert model.first.up is model.second.up is model.first.again
    roster.add("b", config("second.up"))
    assert [path for path, _, _ in roster.adapters("b")] == ["first.up"]
    roster.select(("a", "b"))
    expected = model(x)
    roster.merge()
    torch.testing.assert_close(model(x), expected)
    roster.unmerge()
    assert torch.equal(model(x), expected)
    roster.take_out(merged=False)
    assert trace(model) == before


def test_a_copied_block_holds_none_of_the_adapters_inside_it(net):
    model, roster, x = net
    plain = model(x)
    roster.add("a", config("up", "down"))
    roster.add("b", config("head", modules_to_save=["first"]))
    shake(roster, "b")
    copied = next(a for p, _, a in roster.adapters("b") if p == "first")
    assert not any(isinstance(m, Inlaid) for m in copied.modules())
    with roster.selection.using(active=("a",)):
        with_a = model(x)
    assert not torch.equal(with_a, plain)
    roster.select(("b",))
    with_b = model(x)
    roster.merge()
    torch.testing.assert_close(model(x), with_b)
    roster.take_out(merged=True)
    assert not any(isinstance(m, Inlaid) for m in model.modules())
    assert type(model.first) is Block
    torch.testing.assert_close(model(x), with_b)
