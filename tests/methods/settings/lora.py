"""LoRA: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import llama

LAWS = [{}, {"bias": "lora_only", "r": 3}, {"use_rslora": True, "lora_alpha": 3, "r": 2}]
PEFT = {"plain": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]})}
