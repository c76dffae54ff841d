"""Which arithmetic a run uses, and that the trained weights keep theirs."""

from __future__ import annotations

import pytest
import torch

from inlay.train.precision import choose, reason, units
from inlay.train.settings import TrainConfig
from inlay.train.step import Stepper


def test_what_is_asked_for_is_used(toy):
    assert choose("float32", toy.model().bfloat16()) == torch.float32
    assert choose("bfloat16", toy.model()) == torch.bfloat16
    assert reason("bfloat16", toy.model()) == ""


def test_auto_is_bfloat16_for_bfloat16_weights_and_where_the_cpu_has_units_for_it(toy, monkeypatch):
    assert choose("auto", toy.model().bfloat16()) == torch.bfloat16
    assert reason("auto", toy.model().bfloat16()) == "as the base's weights are"
    for amx, avx, told in ((True, True, "AMX"), (False, True, "AVX512-BF16"), (False, False, "")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert choose("auto", toy.model()) == (torch.bfloat16 if told else torch.float32)
        assert units(torch.device("cpu")) == told
        assert (told or "no units") in reason("auto", toy.model())


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
