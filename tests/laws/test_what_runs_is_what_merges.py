"""Law 1: what runs is what merges. forward(base, x) == base.apply(x, *reweight(W, b)), dropout off.

Every method of the registry is crossed with every kind of layer; `samples` says what is tried.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from inlay.bases import layers, view
from inlay.bases.plain import Opaque
from inlay.core.beside import Copy
from inlay.core.errors import UserError
from inlay.core.inlaid import Adapted, Inlaid
from inlay.core.selection import BASE, Selection
from inlay.methods import method, names
from inlay.model.roster import Roster
from tests.laws.samples import (
    APART,
    HOSTED,
    MADE,
    REFUSED,
    SAMPLES,
    assert_same,
    filled,
    fold,
    holds,
    leaves_of,
    sampled,
)

CROSSED = [(m, s) for m in MADE for s in SAMPLES if holds(m, sampled(s)[0])]
FITS = set(CROSSED)


def paired() -> set[tuple[str, str]]:
    """Return which adapters are set over which: a few over and under all, each over the next one.

    All pairs of all methods would be a hundred thousand cases that say the same.
    """
    few = ["lora", "no more than a meaning", "bias", "copy"]
    ring = set(zip(MADE, [*list(MADE)[1:], "lora"], strict=True))
    return {*itertools.product(few, MADE), *itertools.product(MADE, few), *ring}


# in the order of the registry: the workers of a parallel run must collect the same
STACKED = [
    (below, above, sample)
    for below, above in sorted(paired())
    for sample in SAMPLES
    if (below, sample) in FITS and (above, sample) in FITS
]


def test_every_kind_of_layer_has_a_sample_and_every_method_a_layer():
    tried = {type(view(sampled(name)[0])) for name in SAMPLES}
    assert tried == {layer for layer in layers() if layer is not Opaque}
    assert {made for made, _ in CROSSED} == set(MADE)


def test_the_methods_without_a_host_are_those_declared_so():
    assert set(names()) - set(HOSTED) == {"full", *APART}


@pytest.mark.parametrize(("made", "sample"), CROSSED)
def test_what_runs_is_what_the_weight_says(made, sample):
    module, x = sampled(sample)
    adapter, base = filled(made, module), view(module)
    leaves = leaves_of(x, adapter)
    meant = base.apply(x, *fold(module, adapter))
    assert_same(adapter(base, x), meant, leaves, f"{made} on {sample}")
    assert not torch.allclose(meant, module(x))  # or the law would hold of nothing


@pytest.mark.parametrize(("below", "above", "sample"), STACKED)
def test_a_stack_is_the_fold_of_its_weights(below, above, sample):
    module, x = sampled(sample)
    first, second = filled(below, module, 1), filled(above, module, 3)
    base = view(module)
    adapted = Adapted(first, base)
    torch.testing.assert_close((adapted.weight(), adapted.bias()), fold(module, first))
    leaves = leaves_of(x, first, second)
    meant = base.apply(x, *fold(module, first, second))
    assert_same(second(adapted, x), meant, leaves, f"{above} over {below} on {sample}")
    host = Inlaid(base, Selection(("a", "b")))
    host.adapters.update({"a": first, "b": second})
    assert_same(host(x), meant, leaves, f"a host of {above} over {below} on {sample}")


@pytest.mark.parametrize(
    ("one", "other", "sample"), [case for case in STACKED if "without batch" not in case[2]]
)
def test_each_row_of_a_batch_computes_what_it_would_alone(one, other, sample):
    module, x = sampled(sample)
    first, second = filled(one, module, 1), filled(other, module, 3)
    host = Inlaid(view(module), Selection())
    host.adapters.update({"a": first, "b": second})
    leaves = leaves_of(x, first, second)
    alone = []
    for name in (rows := ["b", BASE, "a"]):
        with host.selection.using(active=(name,)):
            alone.append(host(x[len(alone) : len(alone) + 1]))
    with host.selection.using(rows=rows):
        assert_same(host(x), torch.cat(alone), leaves, f"{one} and {other} on {sample}")


@pytest.mark.parametrize(("made", "sample"), CROSSED)
def test_merging_keeps_what_the_layer_computes_and_unmerging_restores_it_to_the_bit(made, sample):
    module, x = sampled(sample)
    before = dict(module._parameters)
    pristine = {n: p.clone() for n, p in module.named_parameters()}
    host = Inlaid(view(module), Selection())
    host.adapters.update({"a": filled(made, module, 1), "b": filled("copy", module, 3)})
    for chosen in (("a",), ("b", "a"), ("a", "b")):
        host.selection.active = chosen
        ran = host(x)
        host.merge(chosen, check=True)
        host.selection.merged = chosen
        torch.testing.assert_close(host(x), ran, rtol=1e-10, atol=1e-10)
        host.unmerge()
        host.selection.merged = ()
        assert {n: id(p) for n, p in module._parameters.items()} == {
            n: id(p) for n, p in before.items()
        }
    assert all(torch.equal(p, pristine[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("made", "sample"), CROSSED)
def test_a_merge_in_half_precision_is_rounded_once_and_undone_to_the_bit(made, sample, dtype):
    module, _ = sampled(sample)
    module.to(dtype)
    pristine = copy.deepcopy(module)
    adapter = filled(made, module)
    host = Inlaid(view(module), Selection())
    host.adapters["a"] = adapter
    host.merge(("a",))
    if not isinstance(adapter, Copy):  # a copy computes beside the base and is put there at the end
        below = view(pristine)
        wide = [None if t is None else t.double() for t in (below.weight(), below.bias())]
        ideal = adapter.double().reweight(*wide)
        for merged, exact in zip((host.base.weight(), host.base.bias()), ideal, strict=True):
            assert (merged is None) == (exact is None)
            assert exact is None or ulps(merged, exact) <= 0.5 + 1e-3
    host.unmerge()
    for name, parameter in pristine.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(module.get_parameter(name), parameter)


def ulps(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error of `rounded` in units of its dtype's last place."""
    info, exact = torch.finfo(rounded.dtype), exact.detach()
    exponent = exact.abs().clamp_min(info.smallest_normal).log2().floor()
    return float(((rounded.double() - exact).abs() / (2**exponent * info.eps)).max())


def layer(what: str) -> nn.Module:
    return REFUSED[what]() if what in REFUSED else sampled(what)[0]


UNDECLARED = [
    (name, what)
    for name in HOSTED
    if not method(name).config.rooted  # type: ignore[attr-defined]
    for what in (*REFUSED, *SAMPLES)
    if view(layer(what)).kind not in method(name).adapter.on
]


@pytest.mark.parametrize(("name", "what"), UNDECLARED)
def test_a_layer_a_method_is_not_declared_for_is_refused_by_name(name, what):
    module = layer(what)
    model = nn.Sequential(nn.Identity(), module)
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=rf"'1' is a {type(module).__name__}, .*leave it out"):
        Roster(model).add("a", method(name).config(target_modules=["1"]))
    assert dict(model.named_modules()) == before
