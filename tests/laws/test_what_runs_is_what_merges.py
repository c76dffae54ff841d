"""Law 1: what runs is what merges. forward(base, x) == base.apply(x, *reweight(W, b)), dropout off.

Every method of the registry is crossed with every kind of layer. A new file in `inlay/methods` is
tried with its default settings, its parameters filled at random; a new file in `inlay/bases` states
the layers to try it on as `SAMPLES`, beside its `LAYERS`: name -> () -> (module, input).
"""

from __future__ import annotations

import copy
import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import inlay.bases
from inlay.bases import layers, view
from inlay.core.adapter import Adapter, Bias, Copy, Reweight, Wrap
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.inlaid import Adapted, Inlaid
from inlay.core.selection import BASE, Selection
from inlay.methods import method, names
from inlay.methods.lora import LoraConfig
from inlay.model.roster import Roster
from tests.methods.bases import build, llama, settings_of_methods


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


def scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5)


def gemma_norm() -> nn.Module:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    return Gemma2RMSNorm(6)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ids() -> torch.Tensor:
    return torch.randint(1, 11, (3, 4))


class Scale(Reweight):
    """diag(s) W, s * b: a method as short as one can be, which only says what it means."""

    def __init__(self, config: Any, base: Base, *, device: torch.device | None = None) -> None:
        super().__init__(config, base, device=device)
        self.scale = self.parameter(base.shape[0])

    def reweight(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.scale.to(weight.dtype)
        rows = scale if weight.ndim == 1 else scale[:, None]
        return rows * weight, None if bias is None else scale * bias


Sample = Callable[[], tuple[nn.Module, torch.Tensor]]
SAMPLES: dict[str, Sample] = {
    "linear": lambda: (nn.Linear(6, 5), floats(3, 4, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), floats(3, 6)),
    "linear of even sizes": lambda: (nn.Linear(8, 4), floats(3, 4, 8)),
    "Conv1D": lambda: (conv1d(), floats(3, 4, 6)),
    "conv1d": lambda: (nn.Conv1d(2, 5, 3, padding=1, padding_mode="circular"), floats(3, 2, 9)),
    "conv2d": lambda: (
        nn.Conv2d(2, 5, (3, 2), stride=2, padding=1, bias=False),
        floats(3, 2, 7, 8),
    ),
    "conv2d dilated": lambda: (
        nn.Conv2d(2, 5, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
        floats(3, 2, 9, 8),
    ),
    "conv2d without batch": lambda: (nn.Conv2d(2, 5, 3, padding="same"), floats(2, 7, 8)),
    "conv3d": lambda: (nn.Conv3d(2, 5, 2, dilation=(1, 2, 1)), floats(3, 2, 4, 5, 4)),
    "embedding": lambda: (nn.Embedding(11, 6), ids()),
    "embedding with padding": lambda: (nn.Embedding(11, 6, padding_idx=0), ids()),
    "scaled embedding": lambda: (scaled_embedding(), ids()),
    "LayerNorm": lambda: (nn.LayerNorm(6), floats(3, 4, 6)),
    "LayerNorm without bias": lambda: (nn.LayerNorm(6, bias=False), floats(3, 4, 6)),
    "RMSNorm": lambda: (nn.RMSNorm(6), floats(3, 4, 6)),
    "Gemma's RMSNorm": lambda: (gemma_norm(), floats(3, 4, 6)),
    "GroupNorm": lambda: (nn.GroupNorm(2, 6), floats(3, 6, 4, 5)),
    **{
        name: sample
        for file in pkgutil.iter_modules(inlay.bases.__path__)
        for name, sample in getattr(
            importlib.import_module(f"inlay.bases.{file.name}"), "SAMPLES", {}
        ).items()
    },
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed conv": lambda: nn.ConvTranspose1d(4, 6, 3),
    "renormalizing embedding": lambda: nn.Embedding(11, 6, max_norm=1.0),
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "a block": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
    "scaled 8-bit floats": lambda: nn.Linear(6, 5).to(torch.float8_e4m3fn),
}

# what is tried of a method: its defaults, or what its file in tests/methods/settings says
SETTINGS: dict[str, list[dict[str, Any]]] = {
    name: module.LAWS for name, module in settings_of_methods().items()
}
HOSTED = [name for name in names() if method(name).adapter is not None]
WRAPS = [name for name in HOSTED if issubclass(method(name).adapter or Adapter, Wrap)]
"""The methods that declare that no weight can say them: the law holds for all others."""
MADE: dict[str, tuple[type[Adapter], Any]] = {
    **{
        f"{name} {setting or ''}".strip(): (method(name).of(config), config)
        for name in HOSTED
        if name not in WRAPS
        for setting in SETTINGS.get(name, [{}])
        for config in [method(name).config(**setting)]
    },
    "no more than a meaning": (Scale, LoraConfig()),
    "bias": (Bias, LoraConfig(bias="all")),
    "copy": (Copy, LoraConfig()),
}


def sampled(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module, x = SAMPLES[name]()
    module.double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()  # a norm starts as ones, which hide a forgotten weight
    return module, x


def holds(made: str, module: nn.Module) -> bool:
    kind, config = MADE[made]
    base = view(module)
    if base.kind not in kind.on or (kind is Bias and base.bias() is None):
        return False
    try:
        kind(config, base)
    except UserError:  # some methods cut a layer into blocks, and say which sizes they take
        return False
    return True


def filled(made: str, module: nn.Module, seed: int = 1) -> Adapter:
    kind, config = MADE[made]
    adapter = kind(config, view(module)).eval().requires_grad_(True)
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return list(
        torch.autograd.grad(
            (out * torch.randn_like(out)).sum(),
            leaves,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def leaves_of(x: torch.Tensor, *adapters: Adapter) -> list[torch.Tensor]:
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    return inputs + [p for adapter in adapters for p in adapter.parameters()]


def assert_same(
    ran: torch.Tensor, meant: torch.Tensor, leaves: list[torch.Tensor], what: str
) -> None:
    torch.testing.assert_close(ran, meant, rtol=1e-10, atol=1e-10, msg=f"{what}: values")
    torch.testing.assert_close(
        gradients(ran, leaves), gradients(meant, leaves), rtol=1e-9, atol=1e-9
    )


def fold(module: nn.Module, *adapters: Adapter) -> tuple[torch.Tensor, torch.Tensor | None]:
    said = view(module).weight(), view(module).bias()
    for adapter in adapters:
        assert isinstance(adapter, Reweight)
        said = adapter.reweight(*said)
    return said


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
    assert tried == {layer for layer in layers() if layer.kind != "module"}
    assert {made for made, _ in CROSSED} == set(MADE)


def test_the_methods_without_a_host_are_those_declared_so():
    assert set(names()) - set(HOSTED) == {"full"}


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


WRAPPED = [
    (name, setting, sample)
    for name in WRAPS
    if not method(name).config.rooted  # type: ignore[attr-defined]
    for setting in SETTINGS.get(name, [{}])
    for sample in SAMPLES
    if view(sampled(sample)[0]).kind in method(name).adapter.on
]


@pytest.mark.parametrize(("name", "setting", "sample"), WRAPPED)
def test_what_no_weight_can_say_computes_alone_stacks_and_is_refused_by_merge(
    name, setting, sample
):
    module, x = sampled(sample)
    model = nn.Sequential(nn.Identity(), module)
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
    with roster.selection.using(rows=("b", BASE, "a")), pytest.raises(UserError, match="rows of"):
        model(ids)
    roster.take_out(merged=False)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


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
