"""The host: a layer in all but what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from inlay.bases import view
from inlay.core.adapter import Adapter, Wrap
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.inlaid import Adapted, Inlaid
from inlay.core.selection import Selection
from inlay.methods.lora import Lora, LoraConfig


def hosted(layer: nn.Module, *names: str, **settings: Any) -> Inlaid:
    host = Inlaid(view(layer), Selection(names))
    for name in names:
        config = LoraConfig(init_lora_weights=False, r=2, **settings)
        host.adapters[name] = Lora(config, host.base).eval()
        host.adapters[name].reset(host.base)
    return host


class Doubled(Wrap):
    """An adapter that no weight can say."""

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * base(x, *args, **kwargs)


def test_a_host_is_asked_for_what_its_layer_has():
    linear = nn.Linear(4, 3)
    host = hosted(linear, "a")
    assert (host.in_features, host.out_features) == (4, 3)
    assert host.weight is linear.weight
    with pytest.raises(AttributeError):
        host.no_such_thing  # noqa: B018
    tied = nn.Parameter(torch.randn(3, 4))
    host.weight = tied
    assert linear.weight is tied
    assert "weight" not in host._parameters
    host.bias = None
    assert linear.bias is None


def test_a_special_method_of_the_layer_stays_the_layers():
    class Own(nn.Linear):
        def __deepcopy__(self, memo: Any) -> nn.Linear:
            return nn.Linear(4, 3)

    assert isinstance(copy.deepcopy(hosted(Own(4, 3), "a")), Inlaid)


def test_the_input_may_come_by_name():
    class Block(nn.Linear):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states)

    x = torch.randn(2, 4)
    host = hosted(nn.Linear(4, 3), "a")
    assert torch.equal(host(input=x), host(x))
    block = hosted(Block(4, 3), "a")
    assert torch.equal(block(hidden_states=x), block(x))
    with pytest.raises(TypeError, match="without its input 'hidden_states'"):
        block()
    with pytest.raises(TypeError, match="without its input 'hidden_states'"):
        block(states=x)


def test_a_fast_path_takes_the_place_of_the_stack_alone():
    host, x = hosted(nn.Linear(4, 3), "a", "b"), torch.randn(2, 4)
    host.fast = lambda x: x.new_zeros(len(x), 3)
    assert torch.equal(host(x), torch.zeros(2, 3))
    with host.selection.using(rows=["a", "b"]):
        assert not torch.equal(host(x), torch.zeros(2, 3))
    host.selection.active = ("a",)
    host.merge(("a",))
    host.selection.merged = ("a",)
    assert not torch.equal(host(x), torch.zeros(2, 3))


def test_an_adapter_no_weight_can_say_computes_but_is_not_merged():
    host, x = Inlaid(view(nn.Linear(4, 3)), Selection(("w",))), torch.randn(2, 4)
    host.adapters["w"] = Doubled(LoraConfig(), host.base)
    torch.testing.assert_close(host(x), 2 * host.base_layer(x))
    with pytest.raises(TypeError, match="'w' is a Doubled, which no weight can say"):
        host.merge(("w",))
    stacked = Adapted(host.adapters["w"], host.base)
    for ask in (stacked.weight, stacked.bias):
        with pytest.raises(TypeError, match="Doubled cannot be said as a weight"):
            ask()


def test_a_stacked_layer_answers_as_the_layer_below():
    base = view(nn.Conv2d(2, 5, 3))
    stacked = Adapted(Lora(LoraConfig(r=2), base), base)
    assert stacked.shape == base.shape
    assert stacked.file_shapes(2) == base.file_shapes(2)
    assert stacked.kind == "conv"
    assert stacked.module is base.module


def test_merged_values_that_are_not_finite_are_refused_on_request():
    host = hosted(nn.Linear(4, 3), "a")
    before = host.base_layer.weight
    with torch.no_grad():
        host.adapters["a"].lora_A[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        host.merge(("a",), check=True)
    assert host.base_layer.weight is before


def test_the_original_weight_follows_a_model_that_is_converted_while_merged():
    host = hosted(nn.Linear(4, 3), "a")
    original = host.base_layer.weight
    expected = original.to(torch.bfloat16)
    host.merge(("a",))
    host.base_layer.to(torch.bfloat16)
    host.unmerge()
    assert host.base_layer.weight is original
    assert torch.equal(original, expected)
    host.unmerge()  # a second time does nothing
    assert host.base_layer.weight is original


def test_the_layers_own_parameters_are_known_also_while_others_are_merged_in_their_place():
    host = hosted(nn.Linear(4, 3), "a")
    own = dict(host.base_layer._parameters)
    assert host.originals() == own
    host.merge(("a",))
    assert host.base_layer.weight is not own["weight"]
    assert {n: id(p) for n, p in host.originals().items()} == {n: id(p) for n, p in own.items()}


def test_the_state_of_a_host_goes_there_and_back():
    host, other = hosted(nn.Linear(4, 3), "a"), hosted(nn.Linear(4, 3), "a")
    x = torch.randn(2, 4)
    assert not torch.equal(host(x), other(x))
    assert set(host.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "adapters.a.lora_A",
        "adapters.a.lora_B",
    }
    for assign in (False, True):
        other.load_state_dict(host.state_dict(), assign=assign)
        assert torch.equal(host(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_host_that_changes_its_dtype_computes_in_it(dtype):
    host = hosted(nn.Linear(4, 3), "a").to(dtype)
    out = host(torch.randn(2, 4, dtype=dtype))
    assert out.dtype == dtype
    assert {p.dtype for p in host.parameters()} == {dtype}


def test_a_half_precision_layer_has_adapters_in_float32_and_answers_in_its_own():
    host = hosted(nn.Linear(4, 3).bfloat16(), "a")
    assert {p.dtype for p in host.adapters.parameters()} == {torch.float32}
    assert host(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_is_active_in_training_alone():
    host, x = hosted(nn.Linear(4, 3), "a", lora_dropout=0.5), torch.randn(64, 4)
    assert torch.equal(host(x), host(x))
    host.train()
    assert not torch.equal(host(x), host(x))


def test_an_adapters_keys_name_its_parameters_as_they_are_by_default():
    adapter: Adapter = Doubled(LoraConfig(), view(nn.Linear(2, 2)))
    adapter.reset(view(nn.Linear(2, 2)))
    adapter.scale = adapter.parameter(2, 3)
    assert adapter.keys(view(nn.Linear(2, 2))) == {"scale": ("scale", (2, 3))}
