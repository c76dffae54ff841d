"""HRA: reflections, one by one and orthogonal to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.methods.hra import Hra, HRAConfig
from tests.methods.bases import build, llama, output, randomize

SETTINGS: dict[str, Any] = {"r": 5, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("settings", [{}, {"apply_GS": True}])
def test_the_weight_is_turned_by_one_reflection_after_another(settings: dict[str, Any]) -> None:
    layer = nn.Linear(6, 4).double()
    adapter = Hra(HRAConfig(r=3, **settings), view(layer))
    nn.init.normal_(adapter.hra_u)
    vectors: list[torch.Tensor] = []
    meant = layer.weight
    for u in adapter.hra_u.T:
        for before in vectors if settings else []:
            u = u - (before @ u) * before
        vectors.append(u / u.norm())
        meant = meant - 2 * (meant @ vectors[-1])[:, None] * vectors[-1]
    torch.testing.assert_close(adapter.reweight(layer.weight, None)[0], meant)
    turned = adapter.reweight(layer.weight, None)[0]
    torch.testing.assert_close(turned @ turned.T, layer.weight @ layer.weight.T)


@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(33, 20), (7, 33)), (nn.Conv2d(6, 20, 3, padding=1), (2, 6, 5, 4))],
)
def test_an_even_rank_starts_from_the_base_to_the_bit(
    r: int, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    base, x = view(layer), torch.randn(shape)
    adapter = Hra(HRAConfig(r=r), base)
    adapter.reset(base)
    assert torch.equal(adapter(base, x), layer(x))
    assert torch.equal(adapter.reweight(base.weight(), None)[0], base.weight())


def test_an_odd_rank_starts_from_one_reflection() -> None:
    layer = nn.Linear(6, 6, bias=False).double()
    adapter = Hra(HRAConfig(r=5), view(layer))
    adapter.reset(view(layer))
    change = adapter.reweight(layer.weight, None)[0] - layer.weight
    assert torch.linalg.matrix_rank(change) == 1


def test_orthogonal_reflections_in_a_narrow_layer_are_refused() -> None:
    with pytest.raises(inlay.UserError, match="r=7 vectors cannot be orthogonal in a layer of 6"):
        Hra(HRAConfig(r=7, apply_GS=True), view(nn.Linear(6, 4)))


@pytest.mark.parametrize("settings", [{}, {"apply_GS": True}])
@pytest.mark.filterwarnings("ignore")
def test_a_trained_adapter_of_peft_computes_the_same_whatever_its_start(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.HRAConfig(**SETTINGS, **settings, init_weights=False)
    model = peft.get_peft_model(build(llama), config)
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    torch.testing.assert_close(output(ours), output(model), rtol=0, atol=1e-5)
