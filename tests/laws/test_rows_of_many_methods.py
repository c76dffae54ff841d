"""One batch, each row with an adapter of another method: each computes what it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.core.selection import BASE
from inlay.methods import method
from tests.methods.bases import bert, build, llama, randomize, t5

SIX: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "dora": {"r": 2, "use_dora": True, "lora_dropout": 0.1},
    "ia3": {},
    "vera": {"r": 4},
    "bottleneck": {"reduction_factor": 8},
    "ln_tuning": {},
}
MORE: dict[str, dict[str, Any]] = {
    "hira": {"r": 2},
    "road": {"group_size": 2},
    "delora": {"r": 2},
    "hra": {"r": 2},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "head": {"r": 2, "modules_to_save": ["lm_head"]},
}


def with_all(make: Any, settings: dict[str, dict[str, Any]]) -> inlay.PeftModel:
    """Return a model with an adapter of each, all moved off their start."""
    model = None
    for name, given in settings.items():
        config = method("lora" if name in ("dora", "head") else name).config(**given)
        if model is None:
            model = inlay.get_peft_model(build(make), config, name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        randomize(model, 0.5)
    assert model is not None
    return model.double().eval()  # so that what is small is still told apart


def run(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids.flip(1)
    return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("make", [llama, bert, t5])
@pytest.mark.parametrize("settings", [SIX, SIX | MORE], ids=["six", "twelve"])
def test_a_row_of_each_method_and_of_the_base_in_one_batch(make: Any, settings: Any) -> None:
    if make is not llama:
        settings = {k: v for k, v in settings.items() if k != "head"}
    model = with_all(make, settings)
    names = [BASE, *settings, BASE, *reversed(settings)]
    ids = torch.randint(3, 60, (len(names), 7), generator=torch.Generator().manual_seed(0))
    alone = {}
    with torch.no_grad():
        for name in settings:
            model.set_adapter(name)
            alone[name] = run(model, ids)
        with model.disable_adapter():
            alone[BASE] = run(model, ids)
        mixed = run(model, ids, adapter_names=names)
    for name in settings:
        assert not torch.allclose(alone[name], alone[BASE], atol=1e-6), f"{name} changes nothing"
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-10, msg=name)


def test_generation_serves_a_row_of_each_method() -> None:
    model = with_all(llama, SIX)
    names = [*SIX, BASE]
    ids = torch.randint(3, 60, (len(names), 5), generator=torch.Generator().manual_seed(1))
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mixed = model.generate(ids, attention_mask=mask, adapter_names=names, **given)
    for row, name in enumerate(names):
        one, on = ids[row : row + 1], mask[row : row + 1]
        alone = model.generate(one, attention_mask=on, adapter_names=[name], **given)
        assert torch.equal(mixed[row], alone[0]), name
