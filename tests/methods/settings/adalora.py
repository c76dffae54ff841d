"""AdaLoRA: what the laws and the comparison with PEFT try of it.

What is left after ranks were taken away is compared in tests/methods/test_adalora.py. PEFT accepts
use_rslora and alpha_pattern and computes without them; here they are refused.
"""

from tests.methods.bases import bert, gpt2, llama, t5, vit

LAWS = [{"init_r": 3, "lora_alpha": 5}, {"init_r": 2, "bias": "lora_only"}]
PEFT = {
    "decoder": (
        llama,
        {"init_r": 4, "lora_alpha": 64, "total_step": 9, "target_modules": ["q_proj", "down_proj"]},
    ),
    "encoder": (
        bert,
        {
            "init_r": 4,
            "lora_alpha": 64,
            "total_step": 9,
            "bias": "lora_only",
            "target_modules": ["query", "dense"],
        },
    ),
    "Conv1D": (gpt2, {"init_r": 4, "lora_alpha": 32, "total_step": 9, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"init_r": 4, "lora_alpha": 32, "total_step": 9}),
    "conv": (vit, {"lora_alpha": 64, "total_step": 9, "target_modules": ["projection", "q_proj"]}),
}
