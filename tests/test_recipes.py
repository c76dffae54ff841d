"""Every recipe trains: two steps of it, into a folder of the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.documents import ROOT, run_python

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, tmp_path: Path) -> None:
    budget = ["--train.max_steps", "2", "--data.limit", "24", "--output_dir", str(tmp_path / "run")]
    run_python(["-m", "inlay", "train", str(recipe), *budget], ROOT)
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
