"""PVeRA: what the laws and the comparison with PEFT try of it.

As with VeRA, PEFT gives a second adapter of a model the first one's A and B; here each has its own.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"r": 3}]
PEFT = {
    "decoder": (llama, {"r": 8, "target_modules": ["q_proj", "down_proj"]}),
    "decoder, drawn again": (llama, {"r": 8, "save_projection": False, "projection_prng_key": 5}),
    "encoder": (bert, {"r": 4, "target_modules": ["query", "dense"]}),
    "Conv1D": (gpt2, {"r": 8, "fan_in_fan_out": True, "d_initial": 0.3}),
    "encoder-decoder": (t5, {"r": 4, "target_modules": ["q", "wo"]}),
}
