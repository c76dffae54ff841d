"""Starts that are found in a run's rows, and AdaLoRA's ranks, from a recipe to the adapter."""

from __future__ import annotations

import json
import shutil
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.run.folder import START

# PEFT asks models for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "precision": "float32"}
FILE = "adapter_model.safetensors"


def settings(init: str, **more: Any) -> dict[str, Any]:
    modules = ["q_proj", "down_proj"]
    return {"adapter": {"r": 2, "init_lora_weights": init, "target_modules": modules, **more}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_run_finds_the_start_in_its_rows_and_any_reader_can_use_it(start, init):
    run, told = start(**settings(init), train={**ROWS, "max_steps": 3, "learning_rate": 0.01})
    assert f"the adapter starts from the training rows ({init})" in told.texts()
    assert load_file(run.folder / START)
    assert run.is_finished
    trained, _ = run.load()
    base, _ = inlay.load_base()
    back = peft.PeftModel.from_pretrained(base, run.adapter)
    torch.testing.assert_close(logits(back), logits(trained), rtol=0, atol=1e-4)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == ("eva" if init == "eva" else True)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_run_that_goes_on_begins_where_it_began(start, init):
    given = {**settings(init), "train": {**ROWS, "max_steps": 4, "save_steps": 1}}
    run, _ = start(**given)
    wanted = load_file(run.adapter / FILE)
    first = (run.folder / START).stat().st_mtime_ns
    for name in ("checkpoints/step-4", "adapter"):  # as if it had been killed before
        shutil.rmtree(run.folder / name)
    (run.folder / "evaluation.json").unlink()
    again, told = start(**given)
    assert "going on with the run" in told.texts()
    assert (again.folder / START).stat().st_mtime_ns == first
    found = load_file(again.adapter / FILE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_overwriting_a_run_finds_its_start_anew(start):
    one, _ = start(**settings("eva"), train={**ROWS, "max_steps": 1})
    before = (one.folder / START).stat().st_mtime_ns
    two, _ = start(**settings("eva"), train={**ROWS, "max_steps": 1}, overwrite=True)
    assert (two.folder / START).stat().st_mtime_ns > before
    start(train={**ROWS, "max_steps": 1}, overwrite=True)
    assert not (two.folder / START).exists()


def test_a_recipe_of_eva_takes_its_settings(start):
    run, _ = start(
        **settings("eva", eva_config={"rho": 3, "tau": 0.5}),
        train={**ROWS, "max_steps": 1},
    )
    assert run.config.adapter.eva_config == inlay.EvaConfig(rho=3, tau=0.5)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["eva_config"]["rho"] == 3
    ranks = [len(t) for key, t in load_file(run.adapter / FILE).items() if "lora_A" in key]
    assert max(ranks) > 2
    base, _ = inlay.load_base()
    sites = sum(n.endswith(("q_proj", "down_proj")) for n, _ in base.named_modules())
    assert sum(ranks) == 2 * sites


def test_a_recipe_of_adalora_ends_with_the_ranks_that_were_kept(start):
    run, _ = start(
        adapter={"method": "adalora", "init_r": 4, "target_r": 1, "target_modules": ["q_proj"]},
        train={**ROWS, "max_steps": 6, "learning_rate": 0.01},
    )
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["total_step"] == 6
    kept = [sum(mask) for mask in config["rank_pattern"].values()]
    assert sum(kept) == len(kept)
    run.load()


@pytest.mark.parametrize("train", [{"optimizer": "lorafa"}, {"loraplus_lr_ratio": 8}])
def test_a_recipe_of_two_rates_trains(start, train):
    run, _ = start(train={**ROWS, "max_steps": 2, **train})
    assert run.outcome.stopped == "done"
