"""FourierFT: its update is a sum of waves, and where they are is drawn the same every time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.methods.fourierft import FourierFt, FourierFTConfig
from tests.methods.bases import build, llama


def test_an_update_is_a_sum_of_waves_along_both_sides() -> None:
    layer = nn.Linear(9, 7).double()
    adapter = FourierFt(FourierFTConfig(n_frequency=5, scaling=3, random_loc_seed=1), view(layer))
    nn.init.normal_(adapter.fourierft_spectrum)
    places = torch.randperm(63, generator=torch.Generator().manual_seed(1))[:5]
    down, along = (torch.arange(n, dtype=torch.float64) for n in (7, 9))
    meant = torch.zeros(7, 9, dtype=torch.float64)
    for place, c in zip(places.tolist(), adapter.fourierft_spectrum, strict=True):
        turns = place // 9 * down[:, None] / 7 + place % 9 * along / 9
        meant += c * torch.cos(2 * math.pi * turns) * 3 / 63
    torch.testing.assert_close(adapter.delta(torch.float64), meant)


def test_a_layer_smaller_than_the_number_of_coefficients_is_refused_with_the_way_out() -> None:
    with pytest.raises(inlay.UserError, match=r"n_frequency=1000 is more than the 512 entries"):
        inlay.get_peft_model(build(llama), FourierFTConfig(target_modules=["v_proj"]))


def test_layers_of_one_shape_have_the_same_places_and_others_not() -> None:
    config = FourierFTConfig(n_frequency=20, target_modules=["q_proj", "v_proj"])
    model = inlay.get_peft_model(build(llama), config)
    first, narrow, second, _ = [b for n, b in model.named_buffers() if n.endswith("places")]
    assert torch.equal(first, second)
    assert not torch.equal(first, narrow)
    assert not any("places" in key for key in model.state_dict())


def test_what_was_first_drawn_in_inference_can_be_trained_with() -> None:
    layer = nn.Linear(9, 7)
    config = FourierFTConfig(n_frequency=5, random_loc_seed=987)
    with torch.inference_mode():
        FourierFt(config, view(layer))
    adapter = FourierFt(config, view(layer))
    adapter.reset(view(layer))
    adapter(view(layer), torch.randn(2, 9)).sum().backward()
    assert adapter.fourierft_spectrum.grad is not None
