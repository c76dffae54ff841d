"""CPT: what the laws and the comparison with PEFT try of it; training is in `test_cpt.py`.

PEFT counts the types of the input on from the context's last one, so that unless that is a multiple
of 4 no token has a loss, and adds to the caller's own tensor; it does not heed cpt_mask.
"""

from typing import Any

from tests.methods.bases import gpt2, llama

CONTEXT: dict[str, Any] = {
    "cpt_token_ids": [3, 4, 5, 6, 7, 8, 9, 10],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 8],
    "task_type": "CAUSAL_LM",
}
LAWS: list[dict[str, Any]] = [
    {"cpt_token_ids": [3, 4, 5], "opt_projection_epsilon": 5.0, "cpt_tokens_type_mask": [1, 2, 4]}
]
PEFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "decoder": (llama, CONTEXT | {"opt_projection_epsilon": 2.0}),
    "learned positions": (gpt2, CONTEXT | {"opt_projection_format_epsilon": 0.01}),
}
