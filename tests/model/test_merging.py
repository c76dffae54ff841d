"""Merging: the same outputs, every site or none, and undone to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay.core.adapter import Wrap
from inlay.core.base import Base
from inlay.core.beside import Copy
from inlay.core.errors import UserError
from inlay.model.roster import Roster
from tests.model.nets import Net, config, shake, trace


@pytest.fixture
def net() -> tuple[Net, Roster, torch.Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.requires_grad_(False)
    return model, Roster(model), torch.randn(5, 4)


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


@pytest.mark.parametrize("site", ["embed_tokens", "lm_head"])
def test_an_encoder_decoder_keeps_the_flag_its_outputs_are_scaled_by(
    architecture: Any, tmp_path: Path, site: str
):
    from tests.model.conftest import output

    model = architecture("t5")
    roster = Roster(model)
    roster.add("a", config(site))
    adapted = output(model, "t5")
    roster.merge()
    roster.take_out(merged=True)
    assert model.config.tie_word_embeddings is True
    torch.testing.assert_close(output(model, "t5"), adapted, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded, "t5"), adapted, rtol=0, atol=1e-5)


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
