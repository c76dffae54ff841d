"""Trainable tokens: what the laws and the comparison with PEFT try of it."""

from typing import Any

from tests.methods.bases import bert, llama


def tied() -> Any:
    return llama(tie_word_embeddings=True)


NEEDED = {"token_indices": [5, 6, 7]}
LAWS = [{"token_indices": [3, 1]}]
PEFT = {
    "decoder": (llama, {"token_indices": [5, 3, 20]}),
    "encoder": (bert, {"token_indices": [3, 13, 11]}),
    "a tied head": (tied, {"token_indices": [5, 3, 20]}),
    "a head": (llama, {"token_indices": [4, 11], "target_modules": ["lm_head"]}),
}
