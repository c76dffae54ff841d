"""The views of plain layers: what they are set on, and what storing leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inlay.bases import layers, view
from inlay.bases.plain import Conv, Conv1D, Embedding, Linear, Norm, Opaque
from inlay.methods.lora import Lora, LoraConfig


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D as Transposed

    return Transposed(5, 4)


CASES: list[tuple[Any, type, tuple[int, int]]] = [
    (lambda: nn.Linear(4, 5), Linear, (5, 4)),
    (transposed, Conv1D, (5, 4)),
    (lambda: nn.Conv1d(4, 5, 3), Conv, (5, 12)),
    (lambda: nn.Conv2d(4, 5, (3, 2)), Conv, (5, 24)),
    (lambda: nn.Conv3d(4, 5, 2), Conv, (5, 32)),
    (lambda: nn.Embedding(7, 5), Embedding, (5, 7)),
    (lambda: nn.LayerNorm(5), Norm, (5, 1)),
    (lambda: nn.RMSNorm(5), Norm, (5, 1)),
    (lambda: nn.GroupNorm(1, 5), Norm, (5, 1)),
]
OPAQUE = [
    nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, 3),
    nn.Embedding(7, 5, max_norm=1.0),
    nn.BatchNorm1d(5),
    nn.LayerNorm((3, 5)),
    nn.LayerNorm(5, elementwise_affine=False),
    nn.Linear(4, 5).to(torch.float8_e4m3fn),
    nn.MultiheadAttention(4, 2),
    nn.Embedding(7, 5, scale_grad_by_freq=True),
    nn.Tanh(),
]


@pytest.mark.parametrize(("make", "kind", "shape"), CASES)
def test_a_layer_is_seen_by_the_view_of_its_kind_as_a_matrix(make, kind, shape):
    base = view(make())
    assert type(base) is kind
    assert base.shape == shape
    assert base.weight().numel() == shape[0] * shape[1]
    assert base.reason == ""


@pytest.mark.parametrize("module", OPAQUE, ids=str)
def test_whatever_has_no_one_plain_weight_is_only_a_module(module):
    base = view(module)
    assert type(base) is Opaque
    x = torch.zeros(1)
    for ask in (
        base.weight,
        lambda: base.shape,
        lambda: base.apply(x, x),
        lambda: base.down(x, x),
        lambda: base.up(x, x),
        lambda: base.store(x, None),
    ):
        with pytest.raises(TypeError, match=f"{type(module).__name__} has no single weight"):
            ask()


def test_an_opaque_layer_of_a_known_kind_says_why():
    said = [view(module).reason for module in OPAQUE]
    assert "groups=2" in said[0]
    assert "max_norm=1.0" in said[2]
    assert "float8_e4m3fn" in said[6]
    assert "scale_grad_by_freq" in said[-2]
    assert said[1] == said[3] == said[-1] == ""


@pytest.mark.parametrize(("make", "kind", "shape"), CASES)
def test_stored_values_are_new_parameters_and_the_old_ones_stay(make, kind, shape):
    module = make()
    base = view(module)
    old = dict(module._parameters)
    values = {n: None if p is None else p.clone() for n, p in old.items()}
    weight = torch.randn_like(base.weight())
    bias = None if base.bias() is None else torch.randn(shape[0])
    base.store(weight, bias)
    assert torch.equal(base.weight(), weight)
    assert bias is None or torch.equal(base.bias(), bias)
    for name, parameter in old.items():
        assert parameter is None or torch.equal(parameter, values[name])
        assert parameter is None or module._parameters[name] is not parameter
    assert all(p.is_contiguous() and not p.requires_grad for p in module.parameters())


def test_a_norm_has_no_matrix_to_factor_and_no_axis_to_name():
    base, x = view(nn.LayerNorm(5)), torch.zeros(5)
    for ask in (lambda: base.down(x, x), lambda: base.up(x, x), lambda: base.spread(x)):
        with pytest.raises(TypeError, match="LayerNorm is a norm"):
            ask()


def test_a_layer_without_parameters_counts_as_float32_on_the_cpu():
    base = view(nn.Tanh())
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)


def test_adapters_take_the_layers_precision_but_none_below_float32():
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        assert view(nn.Linear(2, 2).to(dtype)).adapter_dtype == expected


def test_every_view_is_tried_before_the_one_that_takes_all():
    assert layers()[-1] is Opaque
    assert sum(layer.accepts(nn.Linear(2, 2)) for layer in layers()) == 2


def test_the_padding_id_is_adapted_like_any_other_and_never_trained():
    """Its column counts; trained as a low-rank update or as the whole weight, it stays."""
    torch.manual_seed(0)
    layer, ids = nn.Embedding(9, 4, padding_idx=0), torch.tensor([[0, 1, 2, 0]])
    base = view(layer)
    adapter = Lora(LoraConfig(r=2, init_lora_weights=False), base)
    adapter.reset(base)
    expected = F.embedding(ids, adapter.reweight(base.weight(), None)[0].T)
    torch.testing.assert_close(adapter(base, ids), expected)

    adapter.config = LoraConfig(r=2)
    adapter.reset(base)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    before = layer.weight[0].clone()
    for _ in range(3):
        adapter(base, ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight, _ = adapter.reweight(base.weight(), None)
    assert torch.equal(weight[:, 0], before)
    assert not torch.allclose(weight[:, 1], layer.weight[1])
