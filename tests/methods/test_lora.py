"""LoRA beside PEFT's: the same start, scale and settings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from inlay.bases import view
from inlay.core.errors import UserError
from inlay.methods.lora import Lora, LoraConfig


def lora(layer: nn.Module, **settings: Any) -> Lora:
    base = view(layer)
    adapter = Lora(LoraConfig(**settings), base)
    adapter.reset(base)
    return adapter


def drawn_by_peft(layer: nn.Module, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    peft = pytest.importorskip("peft")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], **settings)
        )
    site = model.base_model.model[0]
    if isinstance(layer, nn.Embedding):
        return site.lora_embedding_A["default"], site.lora_embedding_B["default"]
    return site.lora_A["default"].weight.flatten(1), site.lora_B["default"].weight.flatten(1)


@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
@pytest.mark.parametrize(
    "layer", [nn.Linear(48, 64), nn.Conv2d(16, 64, 3), nn.Embedding(48, 64)], ids=str
)
def test_the_start_is_drawn_as_peft_draws_it(layer, init):
    torch.manual_seed(0)
    settings = {"r": 16, "init_lora_weights": init}
    ours, theirs = lora(layer, **settings), drawn_by_peft(layer, **settings)
    for mine, peers in zip((ours.lora_A, ours.lora_B), theirs, strict=True):
        a, b = mine.detach(), peers.detach()
        assert a.shape == b.shape
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.12)
        assert float(a.abs().max()) == pytest.approx(float(b.abs().max()), rel=0.4)
    untrained = not torch.count_nonzero(ours.delta(torch.float32))
    assert untrained == bool(init)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 8, "lora_alpha": 32}, 4),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2),
        ({"r": 4, "lora_alpha": 0.5}, 0.125),
    ],
)
def test_the_update_is_scaled_by_alpha_over_r_or_over_its_root(settings, scale):
    assert LoraConfig(**settings).scaling == pytest.approx(scale)
    adapter = lora(nn.Linear(5, 6), init_lora_weights=False, **settings)
    torch.testing.assert_close(
        adapter.delta(torch.float32), scale * adapter.lora_B @ adapter.lora_A
    )


def test_a_site_takes_the_rank_and_alpha_of_the_first_pattern_that_names_it():
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        rank_pattern={r"layers\.0\..*": 3, "q_proj": 5},
        alpha_pattern={"q_proj": 10},
    )
    at = {p: config.at(p) for p in ("layers.0.v_proj", "layers.0.q_proj", "layers.1.q_proj", "x")}
    assert [(c.r, c.lora_alpha) for c in at.values()] == [(3, 4), (3, 10), (5, 10), (2, 4)]
    assert (config.r, config.lora_alpha) == (2, 4)
    assert at["layers.1.q_proj"].scaling == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r=0 must be a whole number from 1 to 65536"),
        ({"r": -4}, "r=-4 must be"),
        ({"r": 2.0}, r"r=2\.0 must be"),
        ({"r": True}, "r=True must be"),
        ({"r": 10**9}, "r=1000000000 must be"),
        ({"rank_pattern": {"r": 0}}, r"rank_pattern\['r'\]=0 must be"),
        ({"rank_pattern": {"q": "4"}}, "='4' must be a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1' must be"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan is no scale"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is no scale"),
        ({"alpha_pattern": {"q": math.inf}}, "=inf is no scale"),
        ({"bias": "some"}, "bias='some' is not one of none, all, lora_only"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights='pizza' is not one of"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora goes with the plain starts"),
        ({"velora_config": {"r": 1}}, "velora_config=.* is not supported: VeLoRA takes the grad"),
        ({"kasa_config": {"beta": -1}}, "beta=-1 and gamma=0.001 are at least 0"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias do not go together"),
        ({"lora_bias": True, "init_lora_weights": "olora"}, "lora_bias goes with the plain starts"),
        ({"use_bdlora": {"blocks": 2}}, "use_bdlora has no 'blocks'.*nblocks"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks=0 must be a whole number"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}},
            "must be two lists without a name in common",
        ),
    ],
)
def test_what_lora_cannot_be_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        LoraConfig(**settings)


def test_the_fields_and_defaults_are_pefts():
    import dataclasses

    peft = pytest.importorskip("peft")

    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    theirs.pop("runtime_config", None)
    assert {f.name for f in dataclasses.fields(LoraConfig)} == set(theirs)
    version = {"peft_version", "peft_type"}
    assert {k: v for k, v in ours.items() if k not in version} == {
        k: v for k, v in theirs.items() if k not in version
    }


def test_the_files_keys_are_pefts_on_every_kind_of_layer():
    base = view(nn.Conv2d(4, 6, 3))
    assert lora(base.module, r=2).keys(base) == {
        "lora_A.weight": ("lora_A", (2, 4, 3, 3)),
        "lora_B.weight": ("lora_B", (6, 2, 1, 1)),
    }
    base = view(nn.Embedding(7, 5))
    assert lora(base.module, r=2).keys(base) == {
        "lora_embedding_A": ("lora_A", (2, 7)),
        "lora_embedding_B": ("lora_B", (5, 2)),
    }
    base = view(nn.Linear(4, 6))
    assert lora(base.module, r=2, bias="lora_only").keys(base) == {
        "lora_A.weight": ("lora_A", (2, 4)),
        "lora_B.weight": ("lora_B", (6, 2)),
        "base_layer.bias": ("bias", (6,)),
    }


def test_a_trained_bias_starts_as_the_layers_and_there_is_none_where_that_has_none():
    layer = nn.Linear(4, 6)
    assert torch.equal(lora(layer, bias="lora_only").bias, layer.bias)
    assert lora(nn.Linear(4, 6, bias=False), bias="lora_only").bias is None
    assert lora(layer).bias is None
