"""LoHa and LoKr: one-dimensional convolutions beside PEFT's, and what training leaves out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.core.adapter import Delta
from inlay.methods import method
from inlay.methods.lokr import factors_of
from tests.methods.bases import randomize

KINDS = ["loha", "lokr"]
SETTINGS: dict[str, dict[str, Any]] = {
    "a kernel apart": {"use_effective_conv2d": True},
    "a kernel among the channels": {},
}
MAKES_UP: dict[str, dict[str, Any]] = {"loha": {}, "lokr": {"rank_dropout_scale": True}}


def made(name: str, layer: nn.Module, **settings: Any) -> Any:
    adapter = method(name).adapter(method(name).config(**settings), view(layer))  # type: ignore[misc]
    assert isinstance(adapter, Delta)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("r", [2, 8])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_convolution_of_any_shape_is_adapted_as_in_peft(
    name: str, settings: dict[str, Any], r: int
) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 10, 1), nn.Flatten(1))
    images = nn.Sequential(nn.Conv2d(6, 8, (3, 2), stride=2), nn.Conv2d(8, 10, 1))
    for base, x in ((model, torch.randn(2, 6, 9)), (images, torch.randn(2, 6, 9, 8))):
        asked = {"r": r, "target_modules": ["0", "1"], **settings}
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
        theirs = peft.get_peft_model(copy.deepcopy(base), kind(**asked))
        randomize(theirs)
        ours = inlay.get_peft_model(copy.deepcopy(base), method(name).config(**asked))
        inlay.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours(x), base(x), atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("r", [1, 8])
def test_an_untrained_update_of_a_convolution_is_zero(name: str, r: int) -> None:
    for layer in (nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, (3, 2)), nn.Conv3d(6, 8, 2)):
        for settings in SETTINGS.values():
            adapter = made(name, layer, r=r, **settings)
            adapter.reset(view(layer))
            assert not adapter.delta(torch.float32).any()
            drawn = [bool(p.any()) for p in adapter.parameters()]
            assert drawn.count(False) == 1


@pytest.mark.parametrize("name", KINDS)
def test_whole_outputs_are_left_out_in_training_and_made_up_for(name: str) -> None:
    layer = nn.Linear(8, 6)
    adapter = made(name, layer, r=2, rank_dropout=0.5, **MAKES_UP[name]).train()
    x = torch.randn(5, 8)
    whole = adapter.eval().update(view(layer), x)
    torch.manual_seed(0)
    share = adapter.train().update(view(layer), x) / whole
    kept = share[0] != 0
    assert 0 < kept.sum() < 6
    torch.testing.assert_close(share, (kept / kept.float().mean()).expand(5, 6))


@pytest.mark.parametrize("name", KINDS)
def test_nothing_kept_is_no_division_by_nothing(name: str) -> None:
    layer = nn.Linear(8, 2)
    adapter = made(name, layer, r=2, rank_dropout=0.99, **MAKES_UP[name]).train()
    for _ in range(5):
        assert adapter.update(view(layer), torch.randn(5, 8)).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_an_update_is_left_out_as_a_whole_in_training(name: str) -> None:
    layer = nn.Linear(8, 6)
    adapter = made(name, layer, r=2, module_dropout=0.5).train()
    x = torch.randn(5, 8)
    whole = adapter.eval().update(view(layer), x)
    torch.manual_seed(0)
    seen = [adapter.train().update(view(layer), x) for _ in range(20)]
    assert all(torch.equal(one, whole) or not one.any() for one in seen)
    assert 0 < sum(bool(one.any()) for one in seen) < 20


@pytest.mark.filterwarnings("ignore")
def test_sides_are_cut_as_peft_cuts_them() -> None:
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    for side in range(1, 200):
        for most in (-1, *range(1, 70)):
            assert factors_of(side, most) == factorization(side, most), (side, most)


def test_what_is_kept_is_not_enlarged_unless_asked_for() -> None:
    layer = nn.Linear(8, 6)
    adapter = made("lokr", layer, r=2, rank_dropout=0.5)
    x = torch.randn(5, 8)
    whole = adapter.eval().update(view(layer), x)
    torch.manual_seed(0)
    share = adapter.train().update(view(layer), x) / whole
    kept = share[0] != 0
    assert 0 < kept.sum() < 6
    assert torch.equal(share, kept.float().expand(5, 6))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("r", [1, 9])
def test_the_style_of_lycoris_leaves_the_larger_matrix_at_zero(r: int, both: bool) -> None:
    layer = nn.Linear(48, 32)
    adapter = made("lokr", layer, r=r, decompose_both=both, init_weights="lycoris")
    adapter.reset(view(layer))
    assert not adapter.delta(torch.float32).any()
    assert [n for n, p in adapter.named_parameters() if not p.any()] == [
        "lokr_w2_b" if r == 1 else "lokr_w2"
    ]


@pytest.mark.parametrize("factor", [0, -2, True, 1.5])
def test_a_factor_that_is_none_is_refused(factor: Any) -> None:
    with pytest.raises(inlay.UserError, match="decompose_factor"):
        inlay.LoKrConfig(decompose_factor=factor)
