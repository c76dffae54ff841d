"""Prompt tuning: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"num_virtual_tokens": 3}]
PEFT = {
    "decoder": (llama, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "learned positions": (
        gpt2,
        {
            "num_virtual_tokens": 4,
            "task_type": "CAUSAL_LM",
            "prompt_tuning_init": "SAMPLE_VOCAB",
        },
    ),
    "encoder with a head": (bert, {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}),
}
