"""What is packed by default trains as it would padded, with every method; else it is padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.methods import method, names
from inlay.objectives.sft import Sft
from inlay.train.settings import TrainConfig
from inlay.train.setup import choose_packing
from tests.laws.test_shares_add_up import token_rows
from tests.methods.bases import build, llama, randomize, settings_of_methods

SETTINGS: dict[str, dict[str, Any]] = {
    name: getattr(module, "NEEDED", {}) for name, module in settings_of_methods().items()
} | {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "miss": {"r": 8},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 50},
}
PADDED = {
    *("cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning"),
    "lily",
}
"""Those whose rows have something of their own that packed rows would share."""
LEFT_OUT = {
    "bitfit": "this base has no biases",
    "xlora": "it mixes adapters from files",
}


def gradients(model: Any, objective: Any, tokenizer: Any) -> Any:
    model.zero_grad()
    batch = objective.collate(token_rows(), tokenizer)
    objective.loss(model, batch, objective.counts(batch)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in names() if name not in LEFT_OUT])
def test_every_method(tiny_tokenizer: Any, name: str) -> None:
    base = build(lambda: llama(vocab_size=320, pad_token_id=2))
    config = method(name).config(task_type="CAUSAL_LM", **SETTINGS.get(name, {}))
    model = inlay.get_peft_model(base, config)
    objective, padded = choose_packing(model, Sft(), TrainConfig())
    assert objective.packing == (padded is None)
    assert objective.packing == (name not in PADDED), padded
    if objective.packing:
        randomize(model, 0.1)
        found, wanted = (gradients(model, o, tiny_tokenizer) for o in (objective, Sft()))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
