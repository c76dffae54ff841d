"""Multitask prompt tuning: what the laws and the comparison with PEFT try of it.

In an encoder-decoder PEFT puts virtual tokens before the decoder's input too, but not where it
generates, and in loading an adapter that started from another asks for that one's file again.
"""

from typing import Any

import torch

from tests.methods.bases import bert, gpt2, llama
from tests.methods.bases import output as plain_output

LAWS: list[dict[str, Any]] = [{"num_virtual_tokens": 3, "num_ranks": 2}]
PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "one task": (llama, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "three tasks": (
        gpt2,
        {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2, "task_type": "CAUSAL_LM"},
    ),
    "encoder with a head": (
        bert,
        {"num_virtual_tokens": 3, "num_tasks": 2, "task_type": "SEQ_CLS"},
    ),
}


def output(model: Any) -> torch.Tensor:
    """Return the logits of two rows, of the last task and the first."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return plain_output(model)
    return plain_output(model, task_ids=torch.tensor([config.num_tasks - 1, 0]))
