"""BOFT: what the laws and the comparison with PEFT try of it.

PEFT computes one factor, whatever boft_n_butterfly_factor says, where its CUDA extension cannot be
built, as here; tests/methods/test_boft.py compares more of them with what that extension computes.
It convolves without dilation and padding_mode, and has no GPT-2.
"""

from tests.methods.bases import bert, llama, t5, vit

LAWS = [
    {"boft_block_size": 2, "bias": "boft_only"},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
]
PEFT = {
    "decoder": (llama, {"boft_block_size": 8, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"boft_block_size": 0, "boft_block_num": 2, "bias": "boft_only"}),
    "encoder-decoder": (t5, {"target_modules": ["q", "wo"]}),
    "conv": (vit, {"boft_block_size": 8, "target_modules": ["projection", "q_proj"]}),
}
