"""BOFT: factors of which PEFT computes more than one only where it can compile its CUDA code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.methods.boft import Boft, BOFTConfig
from tests.methods.bases import build, llama, output, randomize, vit


def made(inputs: int, **settings: Any) -> Boft:
    torch.manual_seed(3)
    adapter = Boft(BOFTConfig(**settings), view(nn.Linear(inputs, 5).double()))
    nn.init.normal_(adapter.boft_R)
    nn.init.normal_(adapter.boft_s)
    return adapter


def blocks_apart(inputs: int, half: int, apart: int) -> list[list[int]]:
    """Return which inputs each block of a factor takes, counted out by hand."""
    halves = [list(range(i, i + half)) for i in range(0, inputs, half)]
    return [
        halves[start + i] + halves[start + apart + i]
        for start in range(0, len(halves), 2 * apart)
        for i in range(apart)
    ]


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_a_factor_turns_halves_of_blocks_that_stand_further_and_further_apart(factors: int) -> None:
    adapter = made(24, boft_block_size=6, boft_n_butterfly_factor=factors)
    meant = torch.eye(24, dtype=torch.float64)
    for i, drawn in enumerate(adapter.boft_R):
        factor = torch.zeros_like(meant)
        for places, r in zip(blocks_apart(24, 3, 2**i), drawn, strict=True):
            skew, one = (r - r.T) / 2, torch.eye(6, dtype=r.dtype)
            factor[torch.tensor(places)[:, None], places] = (one - skew) @ torch.inverse(one + skew)
        meant = factor @ meant
    torch.testing.assert_close(adapter.turn(torch.eye(24, dtype=meant.dtype)), meant)
    torch.testing.assert_close(meant @ meant.T, torch.eye(24, dtype=meant.dtype))
    mixed = (meant[0].abs() > 1e-12).sum()
    assert mixed == 6 * 2 ** (factors - 1)


@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_more_factors_are_those_of_pefts_cuda_extension(
    make: Any, factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = pytest.importorskip("peft.tuners.boft.layer")
    import peft

    class OnCpu:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", OnCpu)
    targets = ["q_proj", "down_proj", "projection"]
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=targets
    )
    model = peft.get_peft_model(build(make), config)
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path)
    assert not torch.allclose(output(ours), output(build(make)), atol=1e-3)
    torch.testing.assert_close(output(ours), output(model), rtol=0, atol=1e-5)
    merged = ours.merge_and_unload().state_dict()
    for key, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-5, msg=key)


def test_in_training_a_share_of_one_factors_blocks_is_left_out() -> None:
    adapter = made(24, boft_block_size=2, boft_n_butterfly_factor=3, boft_dropout=0.5).train()
    one = torch.eye(2, dtype=torch.float64)
    still = [sum(torch.equal(r, one) for r in blocks) for blocks in adapter._blocks()]
    assert sorted(still) == [0, 0, 6]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"boft_block_num": 2}, "boft_block_size=4 and boft_block_num=2: give one of the two"),
        ({"boft_block_size": 5}, "boft_block_size=5 .* does not fit a layer of 48 inputs"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "and that size even"),
        ({"boft_block_size": 8, "boft_n_butterfly_factor": 3}, r"size times 2\^2"),
        ({"boft_n_butterfly_factor": 0}, "must be a whole number from 1 to 32"),
    ],
)
def test_blocks_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(inlay.UserError, match=said):
        inlay.get_peft_model(build(llama), BOFTConfig(target_modules=["down_proj"], **settings))
