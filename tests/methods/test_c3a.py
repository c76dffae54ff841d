"""C3A: circulant blocks, each adapter fed what the layer is fed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.core.inlaid import Inlaid
from inlay.core.selection import Selection
from inlay.methods.c3a import C3a, C3AConfig
from tests.methods.bases import build, llama, output, randomize


def made(size: int, layer: nn.Module) -> C3a:
    adapter = C3a(C3AConfig(block_size=size), view(layer))
    nn.init.normal_(adapter.c3a_kernel)
    return adapter


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_row_of_a_block_is_the_one_above_moved_by_one(size: int) -> None:
    layer = nn.Linear(12, 6).double()
    adapter = made(size, layer)
    delta = adapter.delta(torch.float64) * 12
    for block in (part for row in delta.split(size) for part in row.split(size, 1)):
        for above, below in itertools.pairwise(block):
            assert torch.equal(below, above.roll(1))
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter(view(layer), x), layer(x) + x @ delta.T / 12)


def test_two_active_adapters_add_up() -> None:
    layer = nn.Linear(8, 8).double()
    host = Inlaid(view(layer), Selection(("a", "b")))
    host.adapters["a"], host.adapters["b"] = one, two = made(4, layer), made(2, layer)
    x = torch.randn(3, 8, dtype=torch.float64)
    ran = host(x)
    meant = layer(x) + x @ one.delta(x.dtype).T + x @ two.delta(x.dtype).T
    torch.testing.assert_close(ran, meant)
    host.merge(("a", "b"))
    torch.testing.assert_close(layer(x), meant)


@pytest.mark.parametrize("init", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_it_starts_from_the_base_where_it_is_told_to_and_near_it_else(init: Any) -> None:
    settings = {"block_size": 8, "init_weights": init, "target_modules": ["q_proj"]}
    fresh = output(inlay.get_peft_model(build(llama), C3AConfig(**settings)).eval())
    base = output(build(llama))
    assert torch.equal(fresh, base) == (init is True)
    torch.testing.assert_close(fresh, base, rtol=0, atol=0.1)


@pytest.mark.parametrize("init", ["gaussian", "kaiming_uniform", "xavier_uniform", False])
@pytest.mark.filterwarnings("ignore")
def test_a_random_start_is_as_wide_as_pefts(init: Any) -> None:
    peft = pytest.importorskip("peft")
    settings = {"block_size": 4, "init_weights": init, "target_modules": ["down_proj"]}
    ours = inlay.get_peft_model(build(llama), C3AConfig(**settings))
    theirs = peft.get_peft_model(build(llama), peft.C3AConfig(**settings))
    stds = [
        torch.cat([p.flatten() for n, p in model.named_parameters() if "c3a" in n]).std()
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(*stds, rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_peft_feeds_the_second_adapter_what_the_first_computed() -> None:
    peft = pytest.importorskip("peft")
    settings = {"block_size": 4, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(build(llama), peft.C3AConfig(**settings), "a")
    model.add_adapter("b", peft.C3AConfig(**settings))
    model.base_model.set_adapter(["a", "b"])
    randomize(model.requires_grad_(True), 3.0)
    layer, x = model.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(3, 32)
    ran = layer(x)
    layer.merge()
    assert not torch.allclose(layer(x), ran, atol=1e-3)


def test_a_block_that_does_not_divide_a_layer_is_refused_with_one_that_does() -> None:
    with pytest.raises(inlay.UserError, match=r"block_size .*=256 does not divide .*; try 4"):
        C3a(C3AConfig(), view(nn.Linear(12, 8)))
