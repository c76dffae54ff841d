"""Every method trains from a recipe, on the embedded base, and its run loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inlay.core.errors import UserError
from inlay.methods import names
from inlay.run import train
from tests.methods.bases import settings_of_methods

SETTINGS: dict[str, dict[str, Any]] = {
    name: getattr(module, "NEEDED", {}) for name, module in settings_of_methods().items()
} | {"c3a": {"block_size": 32}, "road": {"group_size": 32}, "vblora": {"vector_length": 32}}
REFUSED = {
    "bitfit": "no layer of this LlamaForCausalLM has a bias",
    "xlora": "must name the LoRAs to mix",
}
"""The methods that no recipe can train on this base -> what the error says."""


@pytest.mark.parametrize("name", names())
def test_a_recipe_trains_with_it(name: str, chats: Path) -> None:
    settings = {
        "adapter": {"method": name, **SETTINGS.get(name, {})},
        "data": {"path": "chats.jsonl", "eval_fraction": 0.25},
        "train": {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "precision": "float32"},
        "evaluate": {"answers": 0},
        "output_dir": "run",
    }
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            train(settings)
        return
    run = train(settings)
    assert run.is_finished
    assert len([e for e in run.events() if e["event"] == "step"]) == 2
    model, _ = run.load()
    assert name == "full" or model.active_adapter == "default"
