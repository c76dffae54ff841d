"""Which arithmetic a run uses, and that the trained weights keep theirs."""

from __future__ import annotations

import pytest
import torch

from inlay.train.precision import choose
from inlay.train.settings import TrainConfig
from inlay.train.step import Stepper


def test_what_is_asked_for_is_used(toy):
    assert choose("float32", toy.model().bfloat16()) == torch.float32
    assert choose("bfloat16", toy.model()) == torch.bfloat16


def test_auto_is_bfloat16_for_bfloat16_weights_and_where_the_cpu_has_units_for_it(toy, monkeypatch):
    assert choose("auto", toy.model().bfloat16()) == torch.bfloat16
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has)
        assert choose("auto", toy.model()) == expected


def test_in_bfloat16_the_gradients_are_close_and_in_the_weights_own_dtype(toy):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.model()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        stepper = Stepper(model, parameters, toy.objective, None, dtype, TrainConfig().seed)
        stepper.gradient(0, [toy.rows(8)])
        found.append({name: parameter.grad for name, parameter in parameters.items()})
    assert all(grad.dtype == torch.float32 for grad in found[1].values())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.02)
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_choice_is_a_setting(dtype):
    TrainConfig(precision=dtype).validate()
