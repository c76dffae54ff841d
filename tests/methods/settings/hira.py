"""HiRA: what the laws and the comparison with PEFT try of it.

Not its rank_pattern: PEFT writes it into the file and gives every layer the one rank r. Here the
pattern counts.
"""

from tests.methods.bases import bert, gpt2, llama, t5, vit

LAWS = [{"r": 2}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 16, "target_modules": ["query", "dense"]}),
    "Conv1D": (gpt2, {"r": 4, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"r": 4, "target_modules": ["q", "wo"]}),
    "conv": (vit, {"r": 4, "target_modules": ["projection", "q_proj"]}),
    "embedding": (llama, {"r": 4, "target_modules": ["embed_tokens"]}),
}
