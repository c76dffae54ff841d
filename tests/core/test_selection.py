"""One object says which adapters compute; nothing chosen for a while outlives it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from inlay.core.errors import UserError
from inlay.core.selection import BASE, Selection
from inlay.methods.lora import LoraConfig
from inlay.model.roster import Roster

CPU = torch.device("cpu")


def test_groups_are_the_rows_of_each_name_repeated_in_place():
    selection = Selection()
    selection.rows = ["a", BASE, "a"]
    once = {n: i.tolist() for n, i in selection.groups(3, CPU).items()}
    assert once == {"a": [0, 2], BASE: [1]}
    twice = {n: i.tolist() for n, i in selection.groups(6, CPU).items()}
    assert twice == {"a": [0, 1, 4, 5], BASE: [2, 3]}
    assert selection.groups(6, CPU) is selection.groups(6, CPU)
    selection.rows = ["b", "a", "a"]
    assert list(selection.groups(3, CPU)) == ["b", "a"]


def test_a_selection_for_a_while_ends_with_its_block_also_after_an_error():
    selection = Selection(("a",))
    with selection.using(active=("b",)):
        assert selection.active == ("b",)
        with selection.using(rows=["a", "b"]):
            assert selection.rows == ("a", "b")
            with selection.alone("b"):
                assert (selection.active, selection.rows) == (("b",), None)
            with selection.alone(BASE):
                assert (selection.active, selection.rows) == ((), None)
        with pytest.raises(KeyError), selection.using(active=(), rows=["a"]):
            raise KeyError
        assert (selection.active, selection.rows) == (("b",), None)
    assert selection.active == ("a",)


def test_while_adapters_are_merged_no_other_can_be_chosen():
    selection = Selection(("a",))
    selection.merged = ("a",)
    selection.active = ("a",)
    with pytest.raises(UserError, match=r"'a'\] is merged into the base.*unmerge_adapter"):
        selection.active = ("b",)
    with pytest.raises(UserError, match="unmerge_adapter"):
        selection.rows = ["a"]
    with pytest.raises(UserError, match="unmerge_adapter"), selection.using(active=()):
        pass
    assert (selection.active, selection.rows) == (("a",), None)
    selection.rows = None


class Deep(nn.Module):
    """Two blocks, each recomputed in the backward pass where `contexts` are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.contexts: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.contexts is None:
                x = block(x).sin()
            else:
                x = checkpoint(
                    lambda h, b=block: b(h).sin(),
                    x,
                    use_reentrant=False,
                    context_fn=self.contexts,
                    determinism_check="none",
                )
        return x


@pytest.fixture
def deep() -> tuple[Deep, Roster]:
    torch.manual_seed(0)
    model = Deep().double()
    roster = Roster(model)
    for name in ("a", "b"):
        roster.add(name, LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False))
        for _, _, adapter in roster.adapters(name):
            adapter.requires_grad_(True)
    return model, roster


def gradients(model: Deep, roster: Roster, **forward: Any) -> dict[str, torch.Tensor | None]:
    """Return the gradients of a forward pass under one selection and a backward under another."""
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with roster.selection.using(**forward):
        loss = model(x).square().sum()
    with roster.selection.using(active=("b",)):
        loss.backward(retain_graph=True)
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "forward",
    [{"active": ("a",)}, {"active": ("a", "b")}, {"active": ()}, {"rows": ["a", BASE, "b", "b"]}],
    ids=str,
)
def test_what_is_recomputed_sees_the_adapters_the_forward_pass_saw(deep, forward):
    model, roster = deep
    for block in model.blocks:
        block.base_layer.requires_grad_(True)  # so that the base alone has a gradient too
    expected = gradients(model, roster, **forward)
    model.contexts = roster.selection.checkpoint_context
    recomputed = gradients(model, roster, **forward)
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (recomputed[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient)
    assert roster.selection.active == ("a",)


def test_without_the_context_a_switch_before_the_backward_pass_is_felt(deep):
    """The hazard itself: or the test above would show nothing."""
    from contextlib import nullcontext

    model, roster = deep
    expected = gradients(model, roster, active=("a",))
    model.contexts = lambda: (nullcontext(), nullcontext())
    recomputed = gradients(model, roster, active=("a",))
    assert any(
        (g is None) != (recomputed[n] is None)
        or (g is not None and not torch.allclose(g, recomputed[n]))
        for n, g in expected.items()
    )


def test_gradients_taken_away_before_the_backward_pass_are_an_error_where_it_recomputes(deep):
    """As with PEFT, select() takes them away; without recomputation torch then drops them."""
    model, roster = deep
    model.contexts = roster.selection.checkpoint_context
    roster.select(("a",))
    loss = model(torch.randn(2, 6, dtype=torch.float64, requires_grad=True)).sum()
    roster.select(("b",))
    with pytest.raises(RuntimeError, match="different number of tensors"):
        loss.backward()


def test_a_copied_model_has_one_selection_of_its_own(deep):
    model, roster = deep
    twin, twins_roster = copy.deepcopy((model, roster))
    selections = {id(block.selection) for block in twin.blocks}
    assert selections == {id(twins_roster.selection)} != {id(roster.selection)}
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    assert torch.equal(twin(x), before)

    twins_roster.select(("b",))
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert [p.requires_grad for n, p in model.named_parameters() if ".a." in n] == [True] * 4
    assert [p.requires_grad for n, p in twin.named_parameters() if ".a." in n] == [False] * 4
    twins_roster.merge()
    assert torch.equal(model(x), before)
    twins_roster.take_out(merged=True)
    assert type(twin.blocks[0]) is nn.Linear
    assert torch.equal(model(x), before)

    roster.select(("b",))
    merged = twin(x)
    torch.testing.assert_close(model(x), merged)


def test_a_compiled_model_follows_the_selection(deep):
    model, roster = deep
    x = torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    for chosen in (("a",), ("b",), ("a", "b"), ()):
        roster.select(chosen)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()
