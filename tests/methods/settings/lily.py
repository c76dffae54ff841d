"""Lily: what the laws and the comparison with PEFT try of it.

PEFT routes a whole batch as one, so that what a row computes depends on the rows beside it: it is
asked for one row at a time, which is what a row computes here in any batch.
"""

from typing import Any

import torch

from tests.methods.bases import bert, llama, t5

LAWS: list[dict[str, Any]] = [{"r": 3}, {"r": 2, "num_B": 3, "scaling": 2.5}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"], "stride_A": 2}),
    "three layers": (
        lambda: llama(num_hidden_layers=3),
        {"r": 4, "num_B": 3, "scaling": 0.5, "stride_A": 2},
    ),
    "encoder": (bert, {"r": 4, "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"r": 4, "stride_A": 2, "target_modules": ["q", "wo"]}),
}


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    """Return the logits of two rows, each computed alone."""
    found = []
    for ids in torch.arange(3, 23).reshape(2, 10).split(1):
        more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
        found.append(model(input_ids=ids, **more).logits)
    return torch.cat(found)
