"""Prefix tuning: what the laws and the comparison with PEFT try of it.

Of an encoder-decoder's L layers PEFT gives layer i the keys and values 2 i (modulo L), so that with
an even L half of the file is not used; its files are computed here as there. Where heads times
their width is not the model's width (T5), PEFT takes a wrong width and fails.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"num_virtual_tokens": 3}, {"num_virtual_tokens": 2, "prefix_projection": True}]
PEFT = {
    "decoder of grouped heads": (llama, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "learned positions, a network": (
        gpt2,
        {
            "num_virtual_tokens": 4,
            "task_type": "CAUSAL_LM",
            "prefix_projection": True,
            "encoder_hidden_size": 5,
        },
    ),
    "encoder with a head": (bert, {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
}
