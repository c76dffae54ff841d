"""WaveFT: the wavelets' filters, and the transform they make."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.methods._wavelets import taps
from inlay.methods.waveft import WaveFt, WaveFTConfig, Wavelet
from tests.methods.bases import build, llama

WAVELETS = typing.get_args(Wavelet)


def overlaps(h: torch.Tensor) -> torch.Tensor:
    """Return the products of a filter with itself, moved by 0, 2, 4 ... places."""
    return torch.stack([(h[2 * i :] * h[: len(h) - 2 * i]).sum() for i in range(len(h) // 2)])


@pytest.mark.parametrize("name", WAVELETS)
def test_a_filter_is_orthonormal_to_its_shifts_and_its_wavelet_has_vanishing_moments(
    name: str,
) -> None:
    h = torch.tensor(taps(name), dtype=torch.float64)
    alone = torch.eye(len(h) // 2, dtype=torch.float64)[0]
    torch.testing.assert_close(overlaps(h), alone, rtol=0, atol=1e-9)
    moments = int(name.lstrip("dbsymcoif")) * (2 if name.startswith("coif") else 1)
    places = torch.arange(len(h), dtype=torch.float64) / len(h)
    signs = (-1.0) ** torch.arange(len(h))
    for power in range(moments):
        torch.testing.assert_close((h * signs * places**power).sum().item(), 0.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", WAVELETS)
def test_the_filters_are_pefts(name: str) -> None:
    wavelet = pytest.importorskip("peft.tuners.waveft.wavelet").Wavelet(name)
    torch.testing.assert_close(list(taps(name)), list(wavelet.rec_lo), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["coif4", "coif5"])
def test_of_the_wavelets_that_peft_has_more_its_filters_are_not_orthonormal(name: str) -> None:
    wavelet = pytest.importorskip("peft.tuners.waveft.wavelet").Wavelet(name)
    products = overlaps(torch.tensor(wavelet.rec_lo, dtype=torch.float64))
    # or PEFT has been mended, and they can be taken here too
    assert (products - torch.eye(len(products))[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["db1", "db2", "sym7", "coif3"])
@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (5, 12), (40, 3)])
@pytest.mark.filterwarnings("ignore")
def test_an_update_of_any_size_is_pefts(name: str, shape: tuple[int, int]) -> None:
    peft = pytest.importorskip("peft")
    settings = {"n_frequency": 14, "wavelet_family": name, "target_modules": ["0"]}
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs = peft.get_peft_model(model, peft.WaveFTConfig(**settings, init_weights=False))
    layer = theirs.base_model.model[0]
    ours = WaveFt(WaveFTConfig(**settings), view(layer.base_layer))
    ours.waveft_spectrum = layer.waveft_spectrum["default"]
    torch.testing.assert_close(ours.delta(torch.float32), layer.get_delta_weight("default"))


def test_haars_transform_turns_the_coefficients_and_keeps_their_length() -> None:
    layer = nn.Linear(8, 6).double()
    adapter = WaveFt(WaveFTConfig(n_frequency=48, scaling=1), view(layer))
    nn.init.normal_(adapter.waveft_spectrum)
    length = torch.linalg.vector_norm(adapter.waveft_spectrum)
    torch.testing.assert_close(torch.linalg.matrix_norm(adapter.delta(torch.float64)), length)


def test_layers_share_the_coefficients_by_their_size() -> None:
    config = WaveFTConfig(
        n_frequency=100, proportional_parameters=True, target_modules=["v_proj", "down_proj"]
    )
    model = inlay.get_peft_model(build(llama), config)
    sizes = {n.split(".")[-3]: p.numel() for n, p in model.named_parameters() if "spectrum" in n}
    # 400 coefficients over two layers each of [16, 32] and of [32, 48]
    counts = [p.numel() for n, p in model.named_parameters() if "waveft_spectrum" in n]
    assert counts == [50, 150, 50, 150], sizes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wavelet_family": "coif4"}, "wavelet_family='coif4' is not one of db1, db2"),
        ({"n_frequency": 0}, "n_frequency=0 must be a whole number from 1"),
        ({"random_loc_seed": None}, "random_loc_seed=None must be a whole number from 0"),
        ({}, r"n_frequency=2592 is more than the 1536 entries of a layer \[32, 48\]"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(inlay.UserError, match=said):
        inlay.get_peft_model(build(llama), WaveFTConfig(target_modules=["down_proj"], **settings))
