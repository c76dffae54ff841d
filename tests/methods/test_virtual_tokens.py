"""What every method of virtual tokens does alike, as tokens or as keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay import get_peft_model
from inlay.methods import method
from tests.methods.bases import build, gpt2, llama, randomize

IDS = torch.tensor([[5, 9, 12, 7, 31], [4, 8, 15, 16, 23]])
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
METHODS = {
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "cpt": {"cpt_token_ids": [3, 4, 5]},
    "cartridge": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_padded_row_generates_what_it_does_alone_with_and_without_a_cache(make, name):
    config = method(name).config(task_type="CAUSAL_LM", **METHODS[name])
    model = get_peft_model(build(make), config).eval()
    randomize(model, 0.5)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1, :3]], 1)
    both = torch.cat([padded, IDS[1:]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = model.generate(both, attention_mask=mask, **GREEDY)
    for row, ids in enumerate((IDS[:1, :3], IDS[1:])):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert together[row, 5:].tolist() == alone[0, ids.shape[1] :].tolist()
    again = model.generate(both, attention_mask=mask, use_cache=False, **GREEDY)
    assert again.tolist() == together.tolist()
