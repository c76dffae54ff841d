"""Trainable tokens: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, llama

LAWS = [{"token_indices": [3, 1]}]
PEFT = {
    "decoder": (llama, {"token_indices": [5, 3, 20]}),
    "encoder": (bert, {"token_indices": [3, 13, 11]}),
    "a head": (llama, {"token_indices": [4, 11], "target_modules": ["lm_head"]}),
}
