"""GraLoRA: what the laws and the comparison with PEFT try of it.

PEFT lets gralora_k leave a rest of r, and fails in the first forward; here that is refused at once.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [
    {"r": 3, "gralora_k": 1, "bias": "gralora_only"},
    {"r": 4, "gralora_k": 2, "alpha": 5, "hybrid_r": 3},
]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 8, "gralora_k": 4, "bias": "gralora_only"}),
    "Conv1D": (gpt2, {"r": 4, "hybrid_r": 2, "alpha": 5, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"r": 4, "hybrid_r": 3, "target_modules": ["q", "wo"]}),
}
