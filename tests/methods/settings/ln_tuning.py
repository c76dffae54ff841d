"""LN tuning: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{}]
HEADED = {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}
PEFT = {
    "decoder": (llama, {}),
    "norms with biases": (gpt2, {}),
    "encoder": (bert, HEADED),
    "encoder-decoder": (t5, {}),
}
# its merge_and_unload leaves the head in its wrapper, beside the untrained one
PEFT_DOES_NOT_MERGE = [HEADED]
