"""Rows of one batch with adapters of their own: each computes what it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.core.selection import BASE
from inlay.methods.lora import LoraConfig
from inlay.model.roster import Roster
from tests.model.conftest import inputs

ROWS = ("a", BASE, "b", "a", "c")


class Net(nn.Module):
    """Ids to logits through every kind of layer that can be adapted, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.mix = nn.Conv1d(12, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.embed(ids)).tanh()
        return self.head(self.norm(self.mix(hidden.transpose(1, 2)).transpose(1, 2)))


def fill(roster: Roster, *names: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for name in names:
        for _, _, adapter in roster.adapters(name):
            adapter.requires_grad_(True)
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.5, generator=generator)


@pytest.fixture
def net() -> tuple[Net, Roster]:
    torch.manual_seed(0)
    model = Net().double()
    roster = Roster(model)
    roster.add("a", LoraConfig(target_modules=["embed", "up", "mix"], r=2))
    roster.add("b", LoraConfig(target_modules=["up"], r=3, bias="all", modules_to_save=["head"]))
    roster.add("c", LoraConfig(target_modules="all-linear", r=1, modules_to_save=["embed"]))
    fill(roster, "a", "b", "c")
    return model, roster


def alone(model: nn.Module, roster: Roster, name: str, x: torch.Tensor) -> torch.Tensor:
    with roster.selection.using(active=() if name == BASE else (name,)):
        return model(x)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_each_row_computes_what_it_would_alone_also_where_beams_repeat_it(net, times):
    model, roster = net
    ids = torch.randint(20, (len(ROWS) * times, 6), generator=torch.Generator().manual_seed(1))
    with roster.selection.using(rows=ROWS):
        together = model(ids)
    for i in range(len(ids)):
        expected = alone(model, roster, ROWS[i // times], ids[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], expected, rtol=0, atol=1e-12)


def test_the_gradient_of_the_batch_is_the_sum_of_the_rows_gradients(net):
    model, roster = net
    ids = torch.randint(20, (len(ROWS), 6), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(len(ROWS), 6, 5, dtype=torch.float64)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    with roster.selection.using(rows=ROWS):
        (model(ids) * weights).sum().backward()
    together = {n: p.grad for n, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    for i, name in enumerate(ROWS):
        share = (alone(model, roster, name, ids[i : i + 1]) * weights[i]).sum()
        if share.requires_grad:
            share.backward()
    assert parameters.keys() == together.keys()
    assert all(g is not None for g in together.values())
    torch.testing.assert_close({n: p.grad for n, p in parameters.items()}, together)


@pytest.mark.parametrize("name", ["a", "b", "c", BASE])
def test_rows_that_all_go_one_way_are_that_way(net, name):
    model, roster = net
    ids = torch.randint(20, (3, 6))
    with roster.selection.using(rows=[name] * 3):
        together = model(ids)
    torch.testing.assert_close(together, alone(model, roster, name, ids), rtol=0, atol=0)


def test_an_error_in_the_middle_of_a_batch_leaves_nothing_behind(net):
    model, roster = net
    ids = torch.randint(20, (len(ROWS), 6))
    before = model(ids)
    with pytest.raises(IndexError), roster.selection.using(rows=ROWS):
        model(ids + 100)
    assert roster.selection.rows is None
    assert roster.selection.active == ("a",)
    assert torch.equal(model(ids), before)


def test_a_batch_that_does_not_fit_the_rows_is_refused(net):
    model, roster = net
    with (
        pytest.raises(UserError, match="has 5 names, but the batch has 4 rows"),
        roster.selection.using(rows=ROWS),
    ):
        model(torch.randint(20, (4, 6)))
    with (
        pytest.raises(UserError, match="has 5 names, but the batch has 0 rows"),
        roster.selection.using(rows=ROWS),
    ):
        model(torch.randint(20, (0, 6)))


def test_rows_name_adapters_of_this_model_or_the_base(net):
    _, roster = net
    assert roster.row_names(["a", BASE, "a", "b"]) == ("a", BASE, "a", "b")
    with pytest.raises(UserError, match="no adapter is called 'd'"):
        roster.row_names(["a", "d"])


def test_rows_and_merging_exclude_each_other(net):
    _, roster = net
    with pytest.raises(UserError, match="rows of a batch"), roster.selection.using(rows=ROWS):
        roster.merge(("a",))
    roster.merge(("a",))
    with pytest.raises(UserError, match="merged"), roster.selection.using(rows=ROWS):
        pass
    assert roster.selection.rows is None
    roster.unmerge()


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * gate


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize("block", [TwoInputs(), TwoOutputs()])
def test_a_copied_block_of_several_tensors_serves_one_adapter_a_batch(block):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "block": block})
    roster = Roster(model)
    for name in ("a", "b"):
        config = LoraConfig(target_modules=["linear"], modules_to_save=["block"])
        roster.add(name, config)
    x = torch.randn(2, 4)
    call: Any = (x, x) if isinstance(block, TwoInputs) else (x,)
    with roster.selection.using(rows=["b", "b"]):
        torch.testing.assert_close(model["block"](*call), block(*call))
    with (
        pytest.raises(UserError, match="several adapters in a batch"),
        roster.selection.using(rows=["a", "b"]),
    ):
        model["block"](*call)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_transformer_serves_several_adapters_in_a_batch(architecture, name):
    model = architecture(name)
    roster = Roster(model)
    roster.add("a", LoraConfig(r=2))
    roster.add("b", LoraConfig(r=3, target_modules="all-linear"))
    fill(roster, "a", "b")
    given = inputs(name)
    with torch.no_grad():
        with roster.selection.using(rows=["b", "a"]):
            together = model(**given).logits
        for i, row in enumerate("ba"):
            with roster.selection.using(active=(row,)):
                single = model(**{k: v[i : i + 1] for k, v in given.items()}).logits
            torch.testing.assert_close(together[i : i + 1], single, rtol=1e-5, atol=1e-5)


def test_beams_follow_their_row(architecture):
    model = architecture("llama")
    roster = Roster(model)
    roster.add("a", LoraConfig(r=2, target_modules="all-linear"))
    roster.add("b", LoraConfig(r=2, target_modules="all-linear"))
    fill(roster, "a", "b")
    ids = inputs("llama")["input_ids"]
    how = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with roster.selection.using(rows=["b", "a"]):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    for i, row in enumerate("ba"):
        with roster.selection.using(active=(row,)):
            one = ids[i : i + 1]
            single = model.generate(one, attention_mask=torch.ones_like(one), **how)
        assert together[i, : single.shape[1]].tolist() == single[0].tolist()
