"""The methods that no weight can say: they compute, stack, switch by row, and merging refuses them.

They are the `Wrap`s of the registry: over one layer, or at the root of a model.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.bases import view
from inlay.core.errors import UserError
from inlay.core.inlaid import Adapted
from inlay.core.selection import BASE
from inlay.methods import method
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.roster import Roster
from tests.laws.samples import SAMPLES, SETTINGS, WRAPS, sampled
from tests.methods.bases import build, llama

WRAPPED = [
    (name, setting, sample)
    for name in WRAPS
    if not method(name).config.rooted  # type: ignore[attr-defined]
    for setting in SETTINGS.get(name, [{}])
    for sample in SAMPLES
    # a LoRA is set beside it
    if view(sampled(sample)[0]).kind in method(name).adapter.on & Lora.on
]


@pytest.mark.parametrize(("name", "setting", "sample"), WRAPPED)
def test_what_no_weight_can_say_computes_alone_stacks_and_is_refused_by_merge(
    name, setting, sample
):
    module, x = sampled(sample)
    model = nn.Sequential(nn.Identity(), module).eval()  # in training some draw at random
    before = {n: p.clone() for n, p in model.named_parameters()}
    roster = Roster(model)
    for adapter in ("a", "b"):
        made = roster.add(adapter, method(name).config(target_modules=["1"], **setting))
        roster.select((adapter,))
        plain = roster.hosts["1"].base_layer(x)
        torch.testing.assert_close(model(x), plain, msg="untrained, it changes something")
        for parameter in made["1"].parameters():
            nn.init.normal_(parameter)
    roster.add("other", LoraConfig(target_modules=["1"]))
    ran = {}
    for chosen in (("a",), ("b",), ("a", "b"), ("other", "a"), ()):
        roster.select(chosen)
        ran[chosen] = model(x)
        host = roster.hosts["1"]
        base = host.base if len(chosen) < 2 else Adapted(host.adapters[chosen[0]], host.base)
        meant = host.adapters[chosen[-1]](base, x) if chosen else host.base_layer(x)
        torch.testing.assert_close(ran[chosen], meant)
        if chosen:
            assert not torch.allclose(ran[chosen], host.base_layer(x))
            with pytest.raises(UserError, match=r"^1: '[ab]' is a \w+, which no weight can say"):
                roster.merge(chosen)
    rows = ("b", BASE, "a")
    with roster.selection.using(rows=rows):
        mixed = model(x)
    for row, adapter in enumerate(rows):
        alone = ran[() if adapter == BASE else (adapter,)]
        torch.testing.assert_close(mixed[row], alone[row])
    roster.take_out(merged=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


ROOTED = [
    (name, setting)
    for name in WRAPS
    if method(name).config.rooted  # type: ignore[attr-defined]
    for setting in SETTINGS.get(name, [{}])
]


@pytest.mark.parametrize(("name", "setting"), ROOTED)
def test_what_stands_before_the_whole_model_switches_and_is_refused_by_merge(name, setting):
    model = build(llama)
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = torch.arange(3, 18).reshape(3, 5)
    plain = model(ids).logits
    roster = Roster(model)
    roster.add("a", method(name).config(**setting))
    roster.add("b", method(name).config(**setting))
    roster.add("other", LoraConfig())
    ran = {}
    for chosen in (("a",), ("b",), ("a", "b"), ("other", "a"), ()):
        roster.select(chosen)
        ran[chosen] = model(ids).logits[:, -5:]
        assert torch.allclose(ran[chosen], plain) == (not chosen)
        if chosen:
            with pytest.raises(UserError, match=r"'[ab]' is a \w+, which no weight can say"):
                roster.merge(chosen)
    with roster.selection.using(rows=("b", "a", "b")):
        mixed = model(ids).logits[:, -5:]
    for row, adapter in enumerate(("b", "a", "b")):
        torch.testing.assert_close(mixed[row], ran[(adapter,)][row])
    rows = ("b", BASE, "a")
    with roster.selection.using(rows=rows):  # what a row lacks is masked
        mixed = model(ids).logits[:, -5:]
    for row, adapter in enumerate(rows):
        alone = ran[() if adapter == BASE else (adapter,)]
        torch.testing.assert_close(mixed[row], alone[row])
    roster.take_out(merged=False)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
