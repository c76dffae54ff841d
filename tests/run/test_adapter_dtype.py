"""Adapters in float32 over a base in 16 bits, or in its dtype (`autocast_adapter_dtype`)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.config.resolve import resolve_python
from inlay.core.errors import UserError
from inlay.run.training import adapted
from tests.run.test_standing import interrupted

HALF = {"autocast_adapter_dtype": False, "dtype": "bfloat16"}


def dtypes(run):
    return {t.dtype for t in load_file(run.adapter / "adapter_model.safetensors").values()}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("more", [{}, {"quantize": "nf4"}, {"adapter": {"use_dora": True}}])
def test_an_adapter_in_16_bits_trains_and_is_saved_so(start, more, optimizer):
    told = {"train": {"optimizer": optimizer, "learning_rate": 0.01}}
    run, _ = start(**HALF, **told, **more)
    assert dtypes(run) == {torch.bfloat16}
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert all(t.any() for name, t in tensors.items() if "lora_B" in name)
    assert run.evaluation["adapter"]["loss"] < run.evaluation["base"]["loss"]


def test_by_default_it_is_in_float32_whatever_the_base(start):
    run, _ = start(dtype="bfloat16")
    assert dtypes(run) == {torch.float32}


def test_a_run_in_16_bits_goes_on_with_the_same_bits(start, monkeypatch):
    whole, _ = start(output_dir="whole", **HALF)
    interrupted(monkeypatch, lambda: start(**HALF), "save")
    run, _ = start(**HALF)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_start_found_in_the_rows_is_in_the_bases_dtype_too(start):
    adapter = {"init_lora_weights": "eva", "target_modules": ["q_proj"]}
    run, _ = start(**HALF, adapter=adapter)
    assert dtypes(run) == {torch.bfloat16}


def test_the_weights_are_those_of_float32_rounded():
    settings = {"data": "chats.jsonl", "dtype": "bfloat16"}
    half, whole = (
        adapted(
            inlay.load_base(dtype="bfloat16")[0],
            resolve_python(None, {**settings, "autocast_adapter_dtype": auto}).config,
        )
        for auto in (False, True)
    )
    for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())


def test_full_fine_tuning_has_no_adapter_to_be_in_it():
    with pytest.raises(UserError, match="adapter full has no adapter"):
        resolve_python(
            None, {"data": "a.jsonl", "autocast_adapter_dtype": False, "adapter": "full"}
        )
