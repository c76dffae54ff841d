"""Uni-LoRA: what the laws and the comparison with PEFT try of it.

PEFT sets it into nn.Linear and Conv1D alone, as we do. With exclude_modules, which its
configuration lacks, there is nothing to compare.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"r": 2, "theta_d_length": 7}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 2, "proj_seed": 3, "target_modules": ["query", "dense"]}),
    "Conv1D, places saved": (
        gpt2,
        {"theta_d_length": 33, "save_indices": True, "fan_in_fan_out": True},
    ),
    "encoder-decoder": (t5, {"theta_d_length": 5000, "target_modules": ["q", "wo"]}),
}
