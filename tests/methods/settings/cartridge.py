"""Cartridge: what the laws and the comparison with PEFT try of it.

As with a prefix, PEFT gives layer i of an encoder-decoder the keys and values 2 i (modulo L).
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"num_virtual_tokens": 3}]
PEFT = {
    "decoder of grouped heads": (
        llama,
        {"num_virtual_tokens": 3, "num_frozen_tokens": 2, "task_type": "CAUSAL_LM"},
    ),
    "learned positions": (
        gpt2,
        {"num_virtual_tokens": 4, "num_frozen_tokens": 0, "task_type": "CAUSAL_LM"},
    ),
    "encoder with a head": (bert, {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
}
