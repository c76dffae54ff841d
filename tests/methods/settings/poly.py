"""Poly: what the laws and the comparison with PEFT try of it.

PEFT drops `task_ids` on their way to the layers where a model has no task_type, so each has one.
"""

from typing import Any

import torch

from tests.methods.bases import bert, llama, t5
from tests.methods.bases import output as plain_output

LAWS: list[dict[str, Any]] = [{"r": 2, "n_skills": 3}]
DECODER: dict[str, Any] = {"r": 2, "n_tasks": 3, "task_type": "CAUSAL_LM"}
PEFT = {
    "decoder": (llama, {**DECODER, "target_modules": ["q_proj", "down_proj"]}),
    "parts": (llama, {**DECODER, "n_splits": 2, "n_skills": 3}),
    "encoder": (bert, {"r": 4, "n_tasks": 3, "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"n_tasks": 3, "n_skills": 2, "task_type": "SEQ_2_SEQ_LM"}),
}


def output(model: Any) -> torch.Tensor:
    """Return the logits of two rows of two tasks."""
    return plain_output(model, task_ids=torch.tensor([2, 0]))
