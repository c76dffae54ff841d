"""Adding, merging and removing: whole or not at all, and without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay.core.adapter import Adapter, Bias, Copy, Wrap
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.methods.lora import LoraConfig
from inlay.model.roster import Roster


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(x))))


def config(*names: str, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(names), r=2, init_lora_weights=False, **settings)


def shake(roster: Roster, name: str, seed: int = 0) -> None:
    """Give the adapter values of its own, also where it starts as a copy of the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapter in roster.adapters(name):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)


def trace(model: nn.Module) -> Any:
    """Return all that must come back: modules, parameters, flags, modes, values."""
    return (
        [(n, id(m), m.training) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        {n: t.tolist() for n, t in model.state_dict().items()},
    )


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


# -- merging


def everything(roster: Roster) -> None:
    roster.add("a", config("up", modules_to_save=["head"], bias="all"))
    roster.add("b", config("up", "down", "head"))
    shake(roster, "a", 1)
    shake(roster, "b", 2)


@pytest.mark.parametrize("chosen", [("a",), ("b",), ("a", "b"), ("b", "a")])
def test_merged_and_taken_out_the_model_computes_what_the_stack_did(net, chosen):
    model, roster, x = net
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    everything(roster)
    roster.select(chosen)
    expected = model(x)
    roster.merge(check=True)
    torch.testing.assert_close(model(x), expected)
    assert roster.take_out(merged=True) is model
    assert [type(m) for m in (model.first.up, model.head)] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    roster.add("again", config("up"))
    assert roster.names == ("again",)


@pytest.mark.parametrize("chosen", [("a",), ("a", "b")])
def test_unmerging_gives_every_parameter_back_itself(net, chosen):
    model, roster, x = net
    everything(roster)
    roster.select(chosen)
    before, expected = trace(model), model(x)
    for _ in range(10):
        roster.merge()
        roster.unmerge()
    assert trace(model) == before
    assert torch.equal(model(x), expected)


def test_merging_another_than_the_active_adapter_makes_it_active_until_unmerged(net):
    model, roster, x = net
    everything(roster)
    with roster.selection.using(active=("b",)):
        expected = model(x)
    before, active = trace(model), model(x)
    roster.merge(("b",))
    assert roster.selection.active == ("b",)
    torch.testing.assert_close(model(x), expected)
    roster.unmerge()
    assert roster.selection.active == ("a",)
    assert trace(model) == before
    assert torch.equal(model(x), active)


def test_unload_while_merged_gives_the_original_back(net):
    model, roster, x = net
    before, expected = trace(model), model(x)
    everything(roster)
    roster.merge(("b",))
    roster.take_out(merged=False)
    assert trace(model) == before
    assert torch.equal(model(x), expected)


def test_what_a_merged_model_cannot_do_is_refused(net):
    _, roster, _ = net
    everything(roster)
    roster.merge(("a",))
    for ask, says in (
        (roster.merge, r"\['a'\] is merged already"),
        (lambda: roster.merge(("b",)), r"\['a'\] is merged already"),
        (lambda: roster.remove("a"), "'a' is merged"),
        (lambda: roster.add("c", config("up")), r"cannot add 'c' while \['a'\] is merged"),
        (lambda: roster.select(("b",)), r"cannot select \['b'\] while"),
        (lambda: roster.select(()), r"cannot select \[\] while"),
    ):
        with pytest.raises(UserError, match=says):
            ask()
    roster.select(("a",))
    roster.remove("b")
    roster.unmerge()
    roster.select(())
    with pytest.raises(UserError, match="no active adapter to merge"):
        roster.merge()


class Tripled(Wrap):
    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        return 3 * base(x)


@pytest.mark.parametrize("how", ["not finite", "no weight"])
def test_nothing_is_merged_where_one_site_cannot_be(net, how):
    model, roster, _ = net
    everything(roster)
    roster.select(("b",))
    path, host, adapter = list(roster.adapters("b"))[-1]
    if how == "no weight":
        host.adapters["b"] = Tripled(adapter.config, host.base)
    else:
        with torch.no_grad():
            adapter.lora_A.fill_(torch.inf)
    before = trace(model)
    with pytest.raises(UserError, match=rf"{path}: .*{how}.*; nothing was merged"):
        roster.merge(check=True)
    assert roster.selection.merged == ()
    assert str(trace(model)) == str(before)  # as text, for nan equals nan


def test_a_check_sees_what_rounding_to_half_precision_makes_infinite():
    model = nn.Sequential(nn.Linear(2, 2)).half()
    roster = Roster(model)
    roster.add("a", config("0", lora_alpha=1e6))
    roster.merge()
    roster.unmerge()
    with pytest.raises(UserError, match="not finite"):
        roster.merge(check=True)


def test_a_check_sees_a_copy_that_is_not_finite(net):
    _, roster, _ = net
    roster.add("a", config("up", modules_to_save=["head"]))
    copied = next(a for _, _, a in roster.adapters("a") if isinstance(a, Copy))
    with torch.no_grad():
        copied.module.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"head: .*not finite"):
        roster.merge(check=True)


def test_a_merged_copy_has_the_models_own_precision(net):
    model, roster, _ = net
    model.bfloat16()
    roster.add("a", config("up", modules_to_save=["head"]))
    shake(roster, "a")
    x = torch.randn(5, 4).bfloat16()
    expected = model(x)
    roster.merge()
    roster.take_out(merged=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


# -- ties


@pytest.mark.parametrize("site", ["embed_tokens", "lm_head"])
def test_merging_one_of_two_tied_layers_parts_them_and_leaves_the_other(
    tiny_llama: Any, tmp_path: Path, site: str
):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=True)
    ids = torch.arange(6)[None]
    tied = model.lm_head.weight
    assert tied is model.model.embed_tokens.weight
    roster = Roster(model)
    roster.add("a", config(site, "q_proj"))
    adapted = model(ids).logits
    roster.merge()
    torch.testing.assert_close(model(ids).logits, adapted, rtol=0, atol=1e-5)
    roster.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied
    roster.merge()
    roster.take_out(merged=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, adapted, rtol=0, atol=1e-5)


def test_tied_layers_stay_tied_where_they_are_not_adapted(tiny_llama: Any):
    model = tiny_llama(tie_word_embeddings=True)
    roster = Roster(model)
    roster.add("a", config("q_proj"))
    roster.merge()
    roster.take_out(merged=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert all(p.requires_grad for p in model.parameters())


def test_a_copied_model_and_roster_merge_apart_from_the_first(net):
    model, roster, x = net
    everything(roster)
    twin, twins = copy.deepcopy((model, roster))
    expected = model(x)
    twins.merge()
    twins.take_out(merged=True)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(twin(x), expected)
