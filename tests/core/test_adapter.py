"""The parts every method is made of, and the copy that stands in a module's place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from inlay.bases import view
from inlay.core.adapter import Adapter
from inlay.core.base import bare_copy
from inlay.core.beside import Bias, Copy
from inlay.core.inlaid import Inlaid
from inlay.core.selection import Selection
from inlay.methods.lora import Lora, LoraConfig

CONFIG = LoraConfig(bias="all")


def copied(module: nn.Module) -> tuple[Copy, Any]:
    base = view(module)
    return Copy(CONFIG, base), base


def test_a_copy_shares_no_memory_with_its_module_and_keeps_to_what_that_has():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copy, base = copied(module)
    x = torch.randn(5, 3)
    assert torch.equal(copy.eval()(base, x), module.eval()(x))
    ours = {p.data_ptr() for p in copy.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in module.parameters())
    assert copy.keys(base) == {
        n: (f"module.{n}", tuple(p.shape)) for n, p in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(3, 4), torch.randn(2, 3)),
        (nn.Embedding(7, 4), torch.tensor([[1, 2]])),
        (nn.LayerNorm(3), torch.randn(2, 3)),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_copy_of_a_half_precision_layer_is_float32_and_answers_as_the_layer_does(module, x):
    module = module.bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    copy, base = copied(module)
    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    assert copy(base, x).dtype == torch.bfloat16
    torch.testing.assert_close(copy(base, x), module(x))


class Many(nn.Module):
    """A block that takes and gives tensors in every wrapping."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, pair: Any, *, mask: Any = None, bag: Any = None) -> Any:
        self.seen = [x.dtype, pair[0].dtype, pair[1].dtype, mask.dtype, bag["y"].dtype]
        out = self.linear(x) + pair[0] + mask + bag["y"]
        return OrderedDict(out=out, parts=[out, pair[1]], name="many")


def test_a_copied_block_gets_every_float_in_its_own_precision_and_gives_back_the_models():
    module = Many().bfloat16()
    copy, base = copied(module)
    half = torch.randn(2, 3).bfloat16()
    ids, bag = torch.arange(2), {"y": half}
    out = copy(base, half, (half, ids), mask=half, bag=bag)
    floats = torch.float32
    assert copy.module.seen == [floats, floats, torch.int64, floats, floats]
    assert bag["y"].dtype == torch.bfloat16
    assert isinstance(out, OrderedDict)
    assert (out["out"].dtype, out["parts"][0].dtype) == (torch.bfloat16, torch.bfloat16)
    assert (out["parts"][1].dtype, out["name"]) == (torch.int64, "many")


def test_a_copy_of_a_module_without_parameters_just_runs():
    copy, base = copied(nn.Tanh())
    x = torch.randn(3).double()
    assert torch.equal(copy(base, x), x.tanh())


def test_a_bare_copy_holds_no_adapters_however_deep_they_sit():
    block = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    x, expected = torch.randn(2, 3), None
    expected = block(x)
    for path, parent in (("0", block), ("0", block[1]), ("1", block)):
        layer = parent._modules[path]
        host = Inlaid(view(layer), Selection(("a",)))
        adapter = Copy(CONFIG, host.base) if path == "1" else Lora(CONFIG, host.base)
        adapter.reset(host.base)
        host.adapters["a"] = adapter
        parent._modules[path] = host
    bare = bare_copy(block)
    assert [type(m) for m in bare.modules()] == [nn.Sequential, nn.Linear] * 2
    assert torch.equal(bare(x), expected)
    assert type(block[0]) is Inlaid


def test_a_bias_alone_starts_as_the_bases_and_moves_nothing_else():
    base, x = view(nn.Linear(3, 4)), torch.randn(2, 3)
    bias = Bias(CONFIG, base)
    bias.reset(base)
    assert torch.equal(bias.bias, base.bias())
    torch.testing.assert_close(bias(base, x), base(x), rtol=0, atol=0)
    weight, _ = bias.reweight(base.weight(), base.bias())
    assert weight is base.weight()


def test_putting_a_parameter_anywhere_into_an_adapter_is_counted():
    adapter = Lora(LoraConfig(r=2), view(nn.Linear(3, 4)))
    before = Adapter.placed
    adapter.lora_A = nn.Parameter(torch.zeros(2, 3))
    assert Adapter.placed > before
    before = Adapter.placed
    adapter.register_parameter("lora_B", nn.Parameter(torch.zeros(4, 2)))
    assert Adapter.placed > before
    before = Adapter.placed
    assert adapter.to(torch.float64) is adapter
    assert Adapter.placed > before
    before = Adapter.placed
    adapter.load_state_dict(adapter.state_dict(), assign=True)
    assert Adapter.placed > before


def test_a_weight_adapter_refuses_a_layer_called_with_more_than_its_input():
    class GatedNorm(nn.LayerNorm):
        pass

    base = view(GatedNorm(3))
    bias = Bias(CONFIG, base)
    with pytest.raises(TypeError, match="GatedNorm is called with more than its input, which Bias"):
        bias(base, torch.randn(2, 3), torch.randn(2, 3))
